"""Networks without memory: their weights have a shape, until others take their place."""

import contextlib
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Modules that are made in this block are on the meta device; only buffers that no file holds are real.

    Nothing global is patched: another thread may make or load another network at the same time.
    """
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Weights that are made are not filled: it would take seconds, and torch's compiler, to fill what has no memory.
    Positions, which no file holds, are counted on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if function is torch.arange:
            kwargs = {"device": "cpu"} | kwargs
        return function(*args, **kwargs)
