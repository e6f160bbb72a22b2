"""`python -m benchmarks.step MODEL`: one training step of a UNet in detail: how far the fast engine's gradient is from PEFT's,
and one with a base in int8 from it, and where the time of a step goes. MODEL is a base model: a diffusers folder or a single
file."""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.helpers import disable_input_dtype_casting
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.traffic import operations_of
from common.errors import run_main
from training.config import LoraSettings, OptimizerSettings
from training.data.batches import Batch
from training.engine import EngineName, prepare_unet
from training.engine.step import TrainStep
from training.method.adapters import inject
from training.method.diffusion import LossConfig, alphas_cumprod
from training.method.optimizers import AdamW
from training.models.base_model import find_base
from training.models.sdxl import Schedule
from training.models.weights import load_unet
from training.system.device import choose_precision

FAMILIES = {
    "attention": r"fmha|flash|sdpa|attention|_attend|cudnn_generated|cudnn::fusion",
    "convolutions": r"conv|fprop|dgrad|wgrad",
    "matrix products": r"_add_gradients|_append_products|gemm|nvjet|cutlass|cublas|addmm|aten[:.]+(mm|bmm|linear)|baddbmm",
    "norms": r"_layer_norm|_group_|norm",
    "GEGLU": r"geglu|gelu",
    "copies and concatenations": r"copy|cat|memcpy|memset|fill",
    "optimizer": r"adam",
}
"""Families of kernels by name; the first pattern that matches counts."""
GB10_FLOPS, GB10_BANDWIDTH = 100e12, 273e9
"""What a GB10 can do in bf16 with dense matrices, about, and its bytes per second."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--latents", type=int, default=128, help="height and width; 128 is 1024 px")
    options = parser.parse_args()
    build = step_builder(options.model)
    plain = build("plain")
    unet, precision = plain.unet, plain.precision
    batch = random_batch(unet, 1, options.latents // 2).to(precision.device)
    reference, other = (autocast_gradient(plain, batch, backend) for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH))
    fast = build("fast", captures=False)  # replaces the forwards of the UNet
    distances = [((each - reference).norm() / reference.norm()).item() for each in (gradient(fast, batch), other)]
    print(
        f"gradient: {distances[0]:.2%} of its norm from PEFT's; PEFT's with another attention kernel {distances[1]:.2%}", flush=True
    )
    whole = random_batch(unet, options.batch, options.latents)
    print(counted(fast, whole), flush=True)
    print(families(build("fast"), whole), flush=True)
    exact = gradient(step_builder(options.model)("plain"), batch)
    in_int8 = gradient(step_builder(options.model, in_int8=True)("plain"), batch)
    print(
        f"gradient with an int8 base: cosine {torch.nn.functional.cosine_similarity(exact, in_int8, dim=0).item():.5f}", flush=True
    )


def step_builder(model: Path, *, in_int8: bool = False) -> Callable[..., TrainStep]:
    """Loads a base model; the returned function builds a training step of a LoRA with some effect, "plain" before "fast"."""
    precision = choose_precision("bf16")
    unet = load_unet(find_base(str(model), model.parent), precision.device, precision.dtype, in_int8=in_int8)
    lora = inject(unet, LoraSettings(), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        lora.weights.add_(0.01 * torch.randn_like(lora.weights))
    config = default_loss(precision.device)
    optimizer = AdamW(lora.weights, OptimizerSettings())

    prepared = {}

    def build(engine: EngineName, *, captures: bool = True) -> TrainStep:
        if engine not in prepared:
            prepared[engine] = prepare_unet(engine, unet, lora, precision.device)
        sync = prepared[engine]
        return TrainStep(unet, lora, optimizer, config, precision, max_grad_norm=1.0, sync_compute_weights=sync, captures=captures)

    return build


def default_loss(device: torch.device) -> LossConfig:
    """The loss of the defaults, for SDXL 1.0."""
    alphas = alphas_cumprod(Schedule()).to(device, torch.float32)
    return LossConfig("epsilon", alphas, min_snr_gamma=5.0, noise_offset=0.0357, latent_scaling=0.13025)


def random_batch(unet: UNet2DConditionModel, size: int, side: int) -> Batch:
    """A random batch on the CPU, like those of the batch reader."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=generator)

    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return Batch(
        mean=5 * normal(4, side, side),
        log_variance=0.1 * normal(4, side, side) - 10,
        latent_noise=normal(4, side, side),
        noise=normal(4, side, side),
        offset=normal(4, 1, 1),
        timesteps=torch.randint(0, 1000, (size,), generator=generator),
        hidden=normal(77, config.cross_attention_dim).to(unet.dtype),
        pooled=normal(pooled).to(unet.dtype),
        add_time_ids=torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]] * size),
        weights=torch.full((size,), 1 / size),
    )


def autocast_gradient(plain: TrainStep, batch: Batch, backend: SDPBackend) -> torch.Tensor:
    """The gradient of all LoRA weights by PEFT's layers with fp32 weights under autocast, with that attention kernel."""
    device = plain.precision.device.type
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    with autocast, disable_input_dtype_casting(plain.unet), sdpa_kernel([backend]):
        return gradient(plain, batch)


def gradient(step: TrainStep, batch: Batch) -> torch.Tensor:
    """[P]: the gradient of all LoRA weights by the engine of `step`."""
    step.sync_compute_weights()
    step.adapter.sums.zero_()
    step.weighted_loss(batch)[0].backward()
    return step.adapter.sums[:-1].clone()


def counted(step: TrainStep, batch: Batch) -> str:
    """FLOPs and bytes of one eager step by family of operations, and the time that they would take on a GB10."""
    step([batch], 1e-4)  # compiles what is compiled once
    operations = operations_of(lambda: step([batch], 1e-4))
    flops, moved = Counter(), Counter()
    for each in operations:
        flops[family_of(each.name)] += each.flops
        moved[family_of(each.name)] += each.moved
    estimate = sum(each.seconds(GB10_FLOPS, GB10_BANDWIDTH) for each in operations)
    lines = [
        f"counted in one step: {flops.total() / 1e12:.1f} TFLOP, {moved.total() / 1e9:.1f} GB read and written; on a GB10 with "
        f"{GB10_FLOPS / 1e12:.0f} TFLOP/s and {GB10_BANDWIDTH / 1e9:.0f} GB/s about {estimate:.2f} s"
    ]
    lines += [f"  {name:26s} {flops[name] / 1e12:7.2f} TFLOP  {count / 1e9:7.1f} GB" for name, count in moved.most_common()]
    return "\n".join(lines)


def family_of(name: str) -> str:
    """The family of a kernel or an operation."""
    return next((family for family, pattern in FAMILIES.items() if re.search(pattern, name, re.IGNORECASE)), "others")


def families(step: TrainStep, batch: Batch) -> str:
    """The time of one step by family of kernels."""
    for _ in range(3):
        step([batch], 1e-4)
    is_cuda = step.precision.device.type == "cuda"
    kind = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    with profile(activities=[kind], acc_events=True) as profiled:
        step([batch], 1e-4)
    times, counts = Counter(), Counter()
    for event in profiled.events():
        family = family_of(event.name)
        times[family] += event.device_time if is_cuda else event.self_cpu_time_total
        counts[family] += 1
    lines = [f"kernels of one step: {sum(counts.values())}, {sum(times.values()) / 1e3:.1f} ms in total"]
    lines += [f"  {name:26s} {took / 1e3:7.1f} ms  {counts[name]:5d}" for name, took in times.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_main("benchmarks.step", main))
