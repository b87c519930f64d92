"""Fixed-size records that are computed once and stored on disk for every run that needs them again.

A record is a row of bytes with a name. LMDB, zarr and diskcache each lack one of what is needed: checksums, a budget
for all runs, read-only folders, and kill -9 at any moment without a repair.
"""
