"""Collective operations between the training processes. With a single process every method returns at once."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from common.errors import MemoryShort, ResourceError, Stopped
from training.system.processes import RankInfo

Value, Item = TypeVar("Value"), TypeVar("Item")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, which may be compiling kernels or filling caches."""


class ProcessLost(ResourceError):
    """Another process has ended; it, or the launcher, has reported why."""


class ProcessGroup:
    """All processes of a run, as seen from one of them."""

    def __init__(self, info: RankInfo | None = None):
        info = info or RankInfo()
        self.rank, self.world_size = info.rank, info.world_size
        self.local_rank, self.local_world_size = info.local_rank, info.local_world_size
        self.is_main_process = info.rank == 0
        """Whether this process makes the decisions and writes the files."""
        self.gpu = info.gpu
        """Index of this process's GPU; None: the current one."""
        self.all_reduce = _all_reduce if self.world_size > 1 else None
        """Sums a tensor over all processes, in place; None for a single process."""

    def all_reduce_max(self, number: int) -> int:
        """The largest `number` of all processes."""
        return int(self._reduce(number, dist.ReduceOp.MAX, torch.int64))

    def all_reduce_sum(self, number: float) -> float:
        """The sum of all processes' `number`."""
        return self._reduce(number, dist.ReduceOp.SUM, torch.float64)

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        self._reduce(0, dist.ReduceOp.MAX, torch.int64)

    def _reduce(self, number: float, operation: dist.ReduceOp, dtype: torch.dtype) -> float:
        """Reduce a number on the CPU, so that the GPU is not waited for."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number, dtype=dtype)
        with _lost_processes():
            dist.all_reduce(tensor, operation)
        return tensor.item()

    def broadcast_object(self, make: Callable[[], Value]) -> Value:
        """What `make` returns in the main process, in every process."""
        if self.world_size == 1:
            return make()
        values = [make() if self.is_main_process else None]
        with _lost_processes():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather_objects(self, value: Value) -> list[Value]:
        """The `value` of every process by rank, in the main process; [] in the others."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.is_main_process else None
        with _lost_processes():
            dist.gather_object(value, values, dst=0)
        return values or []

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite `tensors` with those of the main process."""
        if self.world_size == 1:
            return
        with _lost_processes():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def shard(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of `items`, which are divided among the processes of one machine."""
        return items[self.local_rank :: self.local_world_size]


def _all_reduce(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:  # NCCL reports a lost process later; a RuntimeError here means that the step cannot be captured
        dist.all_reduce(tensor)
        return
    with _lost_processes():
        dist.all_reduce(tensor)


@contextlib.contextmanager
def process_group(info: RankInfo) -> Iterator[ProcessGroup]:
    """Join the other processes. Standard output of all but the main process is discarded: it would repeat the same lines.

    The group is never destroyed: NCCL would wait forever for the CUDA graphs that contain its kernels. The process exits after
    this block.
    """
    if info.world_size == 1:
        yield ProcessGroup(info)
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(info.local_rank)
    is_multi_node = info.world_size > info.local_world_size
    if is_multi_node:
        print(f"waiting for the other machines at {info.address}:{info.port}", flush=True)
    with contextlib.ExitStack() as stack:
        if info.rank:
            devnull = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
        has_joined = not is_multi_node
        try:
            with _lost_processes(), _default_signals():
                init_method = f"tcp://{info.address}:{info.port}"
                dist.init_process_group(backend, init_method, rank=info.rank, world_size=info.world_size, timeout=TIMEOUT)
                processes = ProcessGroup(info)
                processes.barrier()  # gloo logs lines of its own if a process exits while another still connects
            has_joined = True
            yield processes
        except (Stopped, MemoryShort, ProcessLost) as known:
            if info.rank and has_joined:
                sys.exit(known.exit_code)  # the main process, or the one that ended, has reported the reason
            raise


@contextlib.contextmanager
def _default_signals() -> Iterator[None]:
    """End on SIGTERM and SIGINT at once: while torch connects, Python's handlers do not run, and there is nothing to save yet."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _lost_processes() -> Iterator[None]:
    """Raise ProcessLost for the RuntimeError with which torch.distributed reports that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        message = "another training process has ended; run the same command again to resume from the last checkpoint"
        raise ProcessLost(message) from None
