"""`python -m benchmarks.step MODEL`: one training step of a UNet in detail: how far its gradient is from PEFT's, and where its
time goes. MODEL is a base model: a diffusers folder or a single file."""

import argparse
import re
from collections import Counter
from pathlib import Path

import torch
from peft.helpers import disable_input_dtype_casting
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from training.config import LoraSettings, OptimizerSettings
from training.data.batches import Batch
from training.engine.fast.unet import fast_ops, install_fast_forwards
from training.engine.step import Objective, TrainStep
from training.method.adapters import ADAPTER, LoraWeights, inject
from training.method.diffusion import alphas_cumprod
from training.method.optimizers import AdamW
from training.models.base_model import find_base
from training.models.loading import UNet2DConditionModel, load_unet
from training.models.sdxl import Schedule
from training.system.device import choose_precision

FAMILIES = {
    "attention": r"fmha|flash|sdpa|attention|cudnn_generated",
    "convolutions": r"conv|fprop|dgrad|wgrad",
    "matrix products": r"gemm|nvjet|cutlass|cublas|addmm|aten::mm|aten::bmm|aten::linear",
    "norms": r"_layer_norm|_group_|norm",
    "GEGLU": r"geglu|gelu",
    "copies and concatenations": r"copy|cat|memcpy|memset|fill",
    "optimizer": r"adam",
}
"""Families of kernels by name; the first pattern that matches counts."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--latents", type=int, default=128, help="height and width; 128 is 1024 px")
    options = parser.parse_args()
    precision = choose_precision("bf16")
    unet = load_unet(find_base(str(options.model), options.model.parent), precision.device, precision.dtype)
    lora = inject(unet, LoraSettings(), seed=0)
    with torch.no_grad():
        lora.weights.add_(0.01 * torch.randn_like(lora.weights))
        lora.refresh()
    alphas = alphas_cumprod(Schedule()).to(precision.device, torch.float32)
    wanted = Objective("epsilon", alphas, 5.0, 0.0357, 0.13025)
    step = TrainStep(unet, lora, AdamW(lora.weights, OptimizerSettings()), wanted, precision, max_grad_norm=1.0)
    print(agreement(step, random_batch(unet, 1, options.latents // 2)), flush=True)
    print(families(step, random_batch(unet, options.batch, options.latents)), flush=True)


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


def agreement(step: TrainStep, batch: Batch) -> str:
    """The distance of the gradient of `step` from that of PEFT's layers with fp32 weights under autocast, and for comparison how
    much another attention kernel changes the latter. Installs the fast forwards in the UNet."""
    unet, lora = step.unet, step.weights
    batch = batch.to(step.precision.device)
    reference = gradient_by_peft(step, batch, SDPBackend.FLASH_ATTENTION)
    other = gradient_by_peft(step, batch, SDPBackend.MATH)
    install_fast_forwards(unet, lora.stacks, fast_ops(step.precision.device))
    lora.sums.zero_()
    step.weighted_loss(batch).backward()
    fast = fast_gradient(lora)
    distances = [((gradient - reference).norm() / reference.norm()).item() for gradient in (fast, other)]
    return f"gradient: {distances[0]:.2%} of its norm from PEFT's; PEFT's with another attention kernel {distances[1]:.2%}"


def gradient_by_peft(step: TrainStep, batch: Batch, backend: SDPBackend) -> torch.Tensor:
    """The gradient of every LoRA weight, module by module, computed by PEFT's layers, which are restored afterwards."""
    unet, modules = step.unet, step.weights.modules
    layers = [unet.get_submodule(module.name) for module in modules]
    before = [(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight) for layer in layers]
    for layer, module in zip(layers, modules, strict=True):
        layer.lora_A[ADAPTER].weight = torch.nn.Parameter(module.down.clone())
        layer.lora_B[ADAPTER].weight = torch.nn.Parameter(module.up.clone())
    device = step.precision.device.type
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    with autocast, disable_input_dtype_casting(unet), sdpa_kernel([backend]):
        loss = step.weighted_loss(batch)
    loss.backward()
    gradients = []
    for layer, (down, up) in zip(layers, before, strict=True):
        for part, weight in ((layer.lora_A[ADAPTER], down), (layer.lora_B[ADAPTER], up)):
            gradients.append(part.weight.grad.flatten())
            part.weight = weight
    return torch.cat(gradients)


def fast_gradient(lora: LoraWeights) -> torch.Tensor:
    """The same gradient from the flat buffers of the fast engine."""
    rank, parts = lora.modules[0].down.shape[0], {}
    for names, stack in lora.stacks.values():
        for i, name in enumerate(names):
            parts[name] = (stack.down_grad[i * rank : (i + 1) * rank].flatten(), stack.up_grad[i].flatten())
    return torch.cat([part for module in lora.modules for part in parts[module.name]])


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
        family = next((name for name, pattern in FAMILIES.items() if re.search(pattern, event.name, re.IGNORECASE)), "others")
        times[family] += event.device_time if is_cuda else event.self_cpu_time_total
        counts[family] += 1
    lines = [f"kernels of one step: {sum(counts.values())}, {sum(times.values()) / 1e3:.1f} ms in total"]
    lines += [f"  {name:26s} {took / 1e3:7.1f} ms  {counts[name]:5d}" for name, took in times.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
