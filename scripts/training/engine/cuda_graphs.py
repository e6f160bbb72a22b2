"""A function of batches as CUDA graphs: one per shape, replayed with a single launch."""

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch

from training.data.batches import Batch

Step = Callable[[Sequence[Batch]], torch.Tensor]


class CudaGraphRunner:
    """Runs `step` on batches from the CPU: eagerly for the first batches of a shape, as a CUDA graph from then on.

    `step` may change only tensors that exist before; it must not read anything back. What it returns is overwritten by
    its next call. Inputs are copied beside the work that is still going on.
    """

    def __init__(self, step: Step, device: torch.device):
        self._step = step
        self._device = device
        self._copying = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple, _Graph | None] = {}
        self._gave_up = False

    def __call__(self, batches: Sequence[Batch]) -> torch.Tensor:
        shape = tuple(getattr(batch, part.name).shape for batch in batches for part in fields(batch))
        uploaded = self._uploaded(batches)
        if self._gave_up or shape not in self._graphs:
            self._graphs[shape] = None
            return self._step(uploaded)
        if self._graphs[shape] is None:
            self._graphs[shape] = self._captured(uploaded)
        graph = self._graphs[shape]
        return graph.replay(uploaded) if graph else self._step(uploaded)

    def _uploaded(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches on the GPU, copied on a stream of their own; the current stream waits for them."""
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copying):
            uploaded = [batch.to(self._device) for batch in batches]
        current.wait_stream(self._copying)
        for batch in uploaded:
            for part in fields(batch):
                getattr(batch, part.name).record_stream(current)
        return uploaded

    def _captured(self, batches: Sequence[Batch]) -> "_Graph | None":
        """A graph for batches of this shape; None, with a line, if this step cannot be captured: it then stays eager."""
        try:
            return _Graph(self._step, batches, self._pool)
        except RuntimeError as error:
            self._gave_up = True
            reason = str(error).splitlines()[0]
            print(f"training goes on without CUDA graphs, at less than full speed: {reason}", flush=True)
            return None


class _Graph:
    """One captured call of `step`, with input buffers of its own."""

    def __init__(self, step: Step, batches: Sequence[Batch], pool: tuple):
        self._inputs = [Batch(**{part.name: getattr(batch, part.name).clone() for part in fields(batch)}) for batch in batches]
        self._graph = torch.cuda.CUDAGraph()
        # Other threads go on reading batches into pinned memory, which a capture in the usual mode would not survive.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = step(self._inputs)

    def replay(self, batches: Sequence[Batch]) -> torch.Tensor:
        for mine, given in zip(self._inputs, batches, strict=True):
            for part in fields(given):
                getattr(mine, part.name).copy_(getattr(given, part.name))
        self._graph.replay()
        return self._output
