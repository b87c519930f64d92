"""Fixed-size records that are computed once and stored on disk for every run that needs them again.

This package knows nothing of images or networks: a record is a row of bytes with a name. Its interface is
`store.RecordStore`.
"""
