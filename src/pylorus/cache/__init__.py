"""Fixed-size records that are computed once and stored on disk for every run that needs them again.

This package knows nothing of images or networks: a record is a row of bytes with a name. Its interface is
`store.RecordStore`. It is not LMDB, zarr or diskcache because none of them combines checksums, eviction within a budget
that spans runs, reading from a read-only folder, and recovery after kill -9 without a repair.
"""
