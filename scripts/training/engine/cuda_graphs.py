"""Run a function of batches as CUDA graphs: one per shape, replayed with a single launch."""

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch

from training.data.batches import Batch

Step = Callable[[Sequence[Batch]], torch.Tensor]


class CudaGraphRunner:
    """Runs `step` on batches from the CPU: eagerly for the first batches of a shape, as a CUDA graph from then on.

    `step` may change only tensors that exist before it is called, and must not read from the GPU. Its result is overwritten
    by the next call. Inputs are copied to the GPU while the previous step is still running.
    """

    def __init__(self, step: Step, device: torch.device):
        self._step = step
        self._device = device
        self._copying = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple, _Graph | None] = {}
        self._disabled = False

    def __call__(self, batches: Sequence[Batch]) -> torch.Tensor:
        shape = tuple(getattr(batch, part.name).shape for batch in batches for part in fields(batch))
        uploaded = self._copied_to_gpu(batches)
        if self._disabled or shape not in self._graphs:
            # The first step of a shape runs eagerly: it makes cuDNN, cuBLAS and Triton choose and load their kernels, which a
            # capture could not.
            self._graphs[shape] = None
            return self._step(uploaded)
        if self._graphs[shape] is None:
            self._graphs[shape] = self._capture(uploaded)
        graph = self._graphs[shape]
        return graph.replay(uploaded) if graph else self._step(uploaded)

    def _copied_to_gpu(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches on the GPU, copied on a stream of their own; the current stream waits for them."""
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copying):
            uploaded = [batch.to(self._device) for batch in batches]
        current.wait_stream(self._copying)
        for batch in uploaded:
            for part in fields(batch):
                # Without this the allocator could give the memory away once the copying stream is done with it.
                getattr(batch, part.name).record_stream(current)
        return uploaded

    def _capture(self, batches: Sequence[Batch]) -> "_Graph | None":
        """A graph for batches of this shape; None, with a log line, if this step cannot be captured: it then stays eager."""
        try:
            return _Graph(self._step, batches, self._pool)
        except RuntimeError as error:
            self._disabled = True
            reason = str(error).splitlines()[0]
            print(f"CUDA graphs: off, training is slower ({reason})", flush=True)
            return None


class _Graph:
    """One captured call of `step`, with input buffers of its own. All graphs share one memory pool: only one runs at a time."""

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
