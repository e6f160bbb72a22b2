"""What the processes that train together say to each other. Alone, every method answers at once."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from common.errors import MemoryShort, ResourceError, Stopped
from training.system.launcher import RankInfo

Made, Item = TypeVar("Made"), TypeVar("Item")


PATIENCE = timedelta(minutes=30)
"""For a process to reach the others, kernels being compiled and caches being filled meanwhile."""


class ProcessLost(ResourceError):
    """Another process has ended; its own message, or the launcher's, says why."""

    def __init__(self):
        super().__init__("another of the processes has ended; the state saved last is whole: run the same command again")


@dataclass(frozen=True)
class ProcessGroup:
    """All processes of a run, seen from one of them."""

    place: RankInfo = field(default_factory=RankInfo)

    @property
    def is_main_process(self) -> bool:
        """Whether this process decides and writes."""
        return self.place.index == 0

    @property
    def gpu(self) -> int | None:
        """The number of this process's GPU; None: the current one."""
        return self.place.gpu

    @property
    def all_reduce(self) -> Callable[[torch.Tensor], None] | None:
        """Adds a tensor up over all processes, in place; None for a single one."""
        return self._add_up if self.place.count > 1 else None

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of `items` that the processes of one machine share."""
        return items[self.place.local_index :: self.place.local_count]

    def broadcast_object(self, make: Callable[[], Made]) -> Made:
        """What `make` makes in the first process, in every process."""
        if self.place.count == 1:
            return make()
        made = [make() if self.is_main_process else None]
        with _losses_in_our_words():
            dist.broadcast_object_list(made, src=0)
        return made[0]

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite `tensors` with those of the first process."""
        with _losses_in_our_words():
            for tensor in tensors if self.place.count > 1 else ():
                dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Return when every process is here."""
        self.largest(0)

    def largest(self, number: int) -> int:
        """The largest `number` of any process."""
        return int(self._combined(number, dist.ReduceOp.MAX, torch.int64)) if self.place.count > 1 else number

    def total(self, number: float) -> float:
        """The sum of all processes' `number`."""
        return self._combined(number, dist.ReduceOp.SUM, torch.float64) if self.place.count > 1 else number

    def _combined(self, number: float, how: dist.ReduceOp, dtype: torch.dtype) -> float:
        """On the CPU, so that no GPU is waited for."""
        combined = torch.tensor(number, dtype=dtype)
        with _losses_in_our_words():
            dist.all_reduce(combined, how)
        return combined.item()

    def _add_up(self, tensor: torch.Tensor) -> None:
        if tensor.is_cuda:  # NCCL does not answer; a step that cannot be captured must be heard
            dist.all_reduce(tensor)
            return
        with _losses_in_our_words():
            dist.all_reduce(tensor)


@contextlib.contextmanager
def process_group(place: RankInfo) -> Iterator[ProcessGroup]:
    """Meet the other processes. All but the first are quiet: what they would say, the first one says.

    Nobody takes leave: NCCL would wait for ever for the CUDA graphs that it is part of. The process ends after this.
    """
    if place.count == 1:
        yield ProcessGroup(place)
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_index)
    meeting = f"tcp://{place.address}:{place.port}"
    if place.count > place.local_count:
        print(f"meeting the other machines at {place.address}:{place.port}", flush=True)
    with contextlib.ExitStack() as stack:
        if place.index:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        have_met = place.count == place.local_count
        try:
            with _losses_in_our_words(), _signals_end_at_once():
                dist.init_process_group(backend, meeting, rank=place.index, world_size=place.count, timeout=PATIENCE)
                processes = ProcessGroup(place)
                processes.barrier()  # gloo prints lines of its own if one ends while another still connects
            have_met = True
            yield processes
        except (Stopped, MemoryShort, ProcessLost) as known:
            if place.index and have_met:
                sys.exit(known.exit_code)  # the first process, or whoever ended, has said why
            raise


@contextlib.contextmanager
def _signals_end_at_once() -> Iterator[None]:
    """While torch waits for others it does not let Python hear of signals; there is nothing to save yet."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _losses_in_our_words() -> Iterator[None]:
    """torch.distributed answers with a RuntimeError when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        raise ProcessLost from None
