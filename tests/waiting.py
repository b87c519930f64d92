"""Counts what would make the host wait for a GPU, on a machine without one."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "_unique2", "equal", "histc"}
"""Operators of torch whose result, or its shape, the host must know: on a GPU it waits for them."""
READING = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
"""Methods of a tensor that return its values to the host."""


class WaitCounter(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter()
        self._methods = {name: getattr(torch.Tensor, name) for name in READING}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITING or (name in ("index", "index_put", "index_put_") and _has_mask(args[1])):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, self._count(name, method))
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*error)

    def _count(self, name, method):
        def read(tensor, *args, **kwargs):
            self.found[f"Tensor.{name}"] += 1
            return method(tensor, *args, **kwargs)

        return read


def _has_mask(indices) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)
