"""Run a function of batches as CUDA graphs: one per shape, replayed with a single launch."""

from collections.abc import Callable, Sequence

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
        self._graphs: dict[tuple, Step | None] = {}
        self._disabled = False

    def __call__(self, batches: Sequence[Batch]) -> torch.Tensor:
        shape = tuple(tensor.shape for batch in batches for tensor in vars(batch).values())
        uploaded = self._copied_to_gpu(batches)
        if self._disabled or shape not in self._graphs:
            # The first step of a shape runs eagerly: it makes cuDNN, cuBLAS and Triton choose and load their kernels, which a
            # capture could not.
            self._graphs[shape] = None
            return self._step(uploaded)
        if self._graphs[shape] is None:
            self._graphs[shape] = self._capture(uploaded)
        return (self._graphs[shape] or self._step)(uploaded)

    def _copied_to_gpu(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches on the GPU, copied on a stream of their own; the current stream waits for them."""
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copying):
            uploaded = [batch.to(self._device) for batch in batches]
        current.wait_stream(self._copying)
        for batch in uploaded:
            for tensor in vars(batch).values():
                # Without this the allocator could give the memory away once the copying stream is done with it.
                tensor.record_stream(current)
        return uploaded

    def _capture(self, batches: Sequence[Batch]) -> Step | None:
        """The step for batches of this shape as a graph with input buffers of its own; None, with a log line, if it cannot be
        captured: it then stays eager. All graphs share one memory pool: only one runs at a time."""
        graph = torch.cuda.CUDAGraph()
        try:
            inputs = [Batch(**{name: tensor.clone() for name, tensor in vars(batch).items()}) for batch in batches]
            # Other threads go on reading batches into pinned memory, which a capture in the usual mode would not survive.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = self._step(inputs)
        except RuntimeError as error:
            self._disabled = True
            reason = str(error).splitlines()[0]
            print(f"CUDA graphs: off, training is slower ({reason})", flush=True)
            return None

        def replay(given: Sequence[Batch]) -> torch.Tensor:
            for mine, batch in zip(inputs, given, strict=True):
                for name, tensor in vars(batch).items():
                    getattr(mine, name).copy_(tensor)
            graph.replay()
            return output

        return replay
