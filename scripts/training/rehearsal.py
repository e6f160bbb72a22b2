"""A step that is rehearsed in another process while the networks are loaded, so that Triton's kernels are compiled when they are
needed: one after the other, they take ten seconds of the first run on a machine. Triton keeps them in its cache on disk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from common.background import in_background
from training.engine import prepare_unet
from training.job import TrainingJob
from training.method.adapters import inject
from training.models.weights import shapes_only
from training.preparation import has_memory_for_everything, prepare_device
from training.system.device import GIB
from training.system.processes import WorkerProcess

_TOKENS = 77, 154
"""Of a caption in one chunk or two: the kernels of the attention depend on it."""
_FIXED_BYTES = 5 * GIB // 2
"""What it takes of the GPU's memory besides half the activations of one image: 4.3 GiB and a context at 1024 x 1024, on an H100."""


@contextmanager
def rehearsing(job: TrainingJob, rehearser: WorkerProcess | None) -> Iterator[None]:
    """While the block runs, the process `rehearser` rehearses a step of `job`, if there is one and memory for it. It is waited for
    at the end of the block. An error there is logged and changes nothing: the first step compiles what is missing."""
    if rehearser is None or job.engine != "fast" or not has_memory_for_everything(job, _FIXED_BYTES + job.budget.per_image // 2):
        if rehearser:
            rehearser.end()
        yield
        return
    with in_background(lambda: rehearser.call_and_close(rehearse, job), start=True) as rehearsal:
        yield
        # The first step would need as long for the kernels that are missing still.
        if not rehearsal.done():
            print("compiling kernels for this GPU, once on this machine ...", flush=True)
        if error := rehearsal.exception():
            reason = str(error).partition("\n")[0]
            print(f"compiling ahead: failed, the first step takes longer ({type(error).__name__}: {reason})", flush=True)


def rehearse(job: TrainingJob) -> None:
    """Compile the kernels of a step of `job`."""
    prepare_device(job)
    take_small_step(job)


def take_small_step(job: TrainingJob) -> torch.Tensor:
    """The gradient of the LoRA of a UNet like that of `job`, but with transformers of one block and equal weights, for one image
    with captions of each of _TOKENS; the sum of both. All layers have the rank LORA_RANK."""
    device, dtype = job.precision.device, job.precision.dtype
    config = job.base.components["unet"].config
    one_each = [1] * len(config["transformer_layers_per_block"])
    with shapes_only():
        unet = UNet2DConditionModel.from_config({**config, "transformer_layers_per_block": one_each})
    weights = {name: torch.full(each.shape, 0.01, device=device, dtype=dtype) for name, each in unet.state_dict().items()}
    unet.load_state_dict(weights, assign=True)
    unet.requires_grad_(False)
    adapter = inject(unet, replace(job.settings.lora, lora_rank_pattern=""), job.settings.run.train_seed)
    synchronize = prepare_unet(job.engine, unet, adapter, device)
    bucket = job.plan.all_placements[0].bucket
    image = torch.zeros(1, config["in_channels"], bucket.height // 8, bucket.width // 8, device=device, dtype=dtype)
    image = image.contiguous(memory_format=torch.channels_last)
    ids = torch.zeros(1, 6, device=device)
    pooled = config["projection_class_embeddings_input_dim"] - ids.shape[1] * config["addition_time_embed_dim"]
    added = {"text_embeds": torch.zeros(1, pooled, device=device, dtype=dtype), "time_ids": ids}
    for tokens in _TOKENS:
        synchronize()
        hidden = torch.zeros(1, tokens, config["cross_attention_dim"], device=device, dtype=dtype)
        prediction = unet(image, ids[:, 0], encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False)[0]
        prediction.float().sum().backward()
    return adapter.sums[:-1]
