"""FLOPs and bytes of a training step, counted operation by operation, and what they would take on a given card."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
_WITHOUT_KERNEL = {_ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.new_empty_strided, _ATEN._unsafe_view}
_PRODUCTS = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.addmm_, _ATEN.baddbmm_}
_OVERWRITES = {_ATEN.copy_, _ATEN.fill_, _ATEN.zero_}
"""What they change is among their arguments, and is not read."""


@dataclass(frozen=True)
class Operation:
    """One kernel, or the few of one operation of PyTorch."""

    name: str
    flops: int
    """Of matrix products, convolutions and attention; 0 for others, which are bound by memory."""
    moved: int
    """Bytes of every tensor that it reads or writes, each once."""

    def seconds(self, flops: float, bandwidth: float) -> float:
        """The time on a card with `flops` FLOP/s and `bandwidth` bytes/s, of which it takes the slower."""
        return max(self.flops / flops, self.moved / bandwidth)


def operations_of(function: Callable[[], object]) -> list[Operation]:
    """What `function` computes, in order, the backward included. It must not replay a CUDA graph."""
    counter = _Counter()
    with counter, _triton_launches(counter.operations):
        function()
    return counter.operations


class _Counter(TorchDispatchMode):
    """Records every operation of PyTorch that computes or moves something."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        returns, packet = function._schema.returns, function.overloadpacket
        is_view = bool(returns) and all(each.alias_info is not None and not each.alias_info.is_write for each in returns)
        if is_view or packet in _WITHOUT_KERNEL:
            return result
        flops = _product_flops(args) if packet in _PRODUCTS else 0
        if packet in flop_registry and packet not in _PRODUCTS:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        read = tree_leaves((args, kwargs or {}))
        if packet == torch.ops.aten.convolution_backward and not args[-1][1]:
            read = [args[0], args[2]]  # the input is only read for the gradient of the weights
        written = [] if packet in _OVERWRITES else tree_leaves(result)
        self.operations.append(Operation(str(packet), flops, _bytes_of(read) + _bytes_of(written)))
        return result


@contextmanager
def _triton_launches(operations: list[Operation]) -> Iterator[None]:
    """Also records the Triton kernels that are launched in this block."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return
    run = JITFunction.run

    def recorded(self, *args, **kwargs):
        if not kwargs.get("warmup"):
            operations.append(Operation(self.fn.__name__, 0, _bytes_of(tree_leaves([*args, *kwargs.values()]))))
        return run(self, *args, **kwargs)

    JITFunction.run = recorded
    try:
        yield
    finally:
        JITFunction.run = run


def _product_flops(args: tuple) -> int:
    """Of the product of the last two tensors among `args`, with any dtype of the result."""
    a, b = [each for each in args if isinstance(each, torch.Tensor)][-2:]
    return 2 * a.numel() * b.shape[-1]


def _bytes_of(values: list) -> int:
    """Bytes of the tensors among `values`; one that occurs twice, and repeated elements, count once."""
    tensors = {value.data_ptr(): value for value in values if isinstance(value, torch.Tensor)}
    total = 0
    for tensor in tensors.values():
        elements = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            elements *= size if stride else 1
        total += elements * tensor.element_size()
    return total
