"""Records of fixed size, computed once and kept on disk for every run that needs them again.

The room knows nothing of images or networks: a record is a row of bytes with a name. `store.RecordStore` is its door.
"""
