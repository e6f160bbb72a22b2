"""What the tests on a GPU train: a UNet of medium size, its batches and its steps."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from training.config import LoraSettings, OptimizerSettings
from training.data.batches import Batch
from training.engine import prepare_unet
from training.engine.fast import ops
from training.engine.step import TrainStep
from training.method.adapters import Adapter, inject
from training.method.diffusion import LossConfig, alphas_cumprod
from training.method.optimizers import AdamW, Optimizer
from training.models.base_model import find_base
from training.models.sdxl import Schedule
from training.models.weights import load_unet
from training.system.device import Precision

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when cuBLAS is first used; for `make_deterministic`

STEPS, RATE = 50, 1e-3


FAST_ADAPTERS = [
    {"lora_conv_rank": 4},
    {"lora_conv_rank": 16, "lora_rank_pattern": "samplers=6:3 mid_block=0", "lora_rslora": True},
    {"lora_type": "dora"},
    {"lora_type": "dora", "lora_conv_rank": 4, "lora_rank_pattern": "attn1.to_q=4:2 attn2.to_v=16"},
]
"""Settings of adapters that the fast engine takes besides linear LoRA layers."""


def fresh(base: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, Adapter]:
    unet = load_unet(find_base(str(base), base.parent), torch.device("cuda"), dtype)
    return unet, inject(unet, LoraSettings(lora_rank=8, lora_alpha=8.0), seed=3)


def batch_of(seed: int, size: int = 4, height: int = 32, width: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=generator)

    latents = {name: normal(4, height, width) for name in ("latent_noise", "noise")}
    return Batch(
        mean=5 * normal(4, height, width),
        log_variance=0.1 * normal(4, height, width) - 10,
        **latents,
        offset=normal(4, 1, 1),
        timesteps=torch.randint(0, 1000, (size,), generator=generator),
        hidden=normal(77, 192).bfloat16(),
        pooled=normal(128).bfloat16(),
        add_time_ids=torch.tensor([[256.0, 256, 0, 0, 8.0 * height, 8.0 * width]] * size),
        weights=torch.full((size,), 1 / size),
    ).pinned()


def part_of(batch: Batch, first: int, last: int) -> Batch:
    return Batch(**{name: tensor[first:last] for name, tensor in vars(batch).items()})


def loss_config() -> LossConfig:
    return LossConfig("epsilon", alphas_cumprod(Schedule()).float().cuda(), 5.0, 0.0357, 0.13025)


def stepper(base: Path, name: str = "fast", *, recomputes: bool = False, captures: bool = True) -> tuple[TrainStep, Adapter]:
    """The training step of a fresh adapter in bf16, by the engine `name`."""
    unet, lora = fresh(base, torch.bfloat16)
    return step_of(name, unet, lora, AdamW(lora.weights, OptimizerSettings()), recomputes, captures), lora


def step_of(
    name: str, unet: torch.nn.Module, lora: Adapter, optimizer: Optimizer, recomputes: bool = False, captures: bool = True
) -> TrainStep:
    sync = prepare_unet(name, unet, lora, torch.device("cuda"), gradient_checkpointing=recomputes)
    precision = Precision(torch.device("cuda"), torch.bfloat16)
    return TrainStep(unet, lora, optimizer, loss_config(), precision, 1.0, sync_compute_weights=sync, captures=captures)


@contextmanager
def bandwidth(is_short: bool) -> Iterator[None]:
    """As on cards with HBM, or as on others, on any card."""
    cards = set() if is_short else {torch.cuda.get_device_capability()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "CARDS_WITH_HBM", cards)
        yield


@functools.cache
def trained(
    base: Path, name: str = "fast", *, captures: bool, recomputes: bool = False, micro_batches: int = 1, is_short: bool = False
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and learned changes of 50 steps of an engine."""
    losses = []
    with bandwidth(is_short):
        step, lora = stepper(base, name, recomputes=recomputes, captures=captures)
        for number in range(STEPS):
            whole = batch_of(number % 10)
            size = len(whole.weights) // micro_batches
            parts = [part_of(whole, first, first + size) for first in range(0, len(whole.weights), size)]
            losses.append(step(parts, RATE).loss)
    return losses, {module.name: (module.zero @ module.factors["lora_down.weight"]).cpu() for module in lora.modules}
