"""`python -m benchmarks.sample MODEL`: how long sample images take, beside the UNet and the VAE alone. MODEL is a base model, a
diffusers folder. Needs CUDA."""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.step import random_batch, step_builder
from benchmarks.train import require_gpu
from common.errors import run_main
from training.callbacks.renderer import Renderer
from training.callbacks.sample_prompts import SamplePrompt
from training.engine.step import CudaGraphs
from training.models.base_model import find_base
from training.models.sdxl import Schedule
from training.models.weights import load_vae
from training.system.device import GIB

STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sample", description=__doc__)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    base = find_base(str(options.model), options.model.parent)
    require_gpu()
    step = step_builder(options.model)("fast")
    batch = random_batch(step.unet, 4, 128)
    per_sample = seconds(lambda: step([batch], 1e-4)) / 4
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; training 1024 px: {1e3 * per_sample:.1f} ms a sample",
        flush=True,
    )
    vae = load_vae(base, torch.device("cpu"))
    config = step.unet.config
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.safetensors")
        one = random_batch(step.unet, 1, 128)
        save_file({"hidden": one.hidden, "pooled": one.pooled}, path)
        for side in (1024, 768):
            pair = random_batch(step.unet, 2, side // 8).to(step.precision.device)
            alone = CudaGraphs(step.predict, "this benchmark is")

            @torch.no_grad()
            def unet(alone: CudaGraphs = alone, pair=pair) -> None:
                alone(pair.noise, pair.timesteps, pair.add_time_ids, pair.hidden, pair.pooled)

            latents = torch.randn(1, config.in_channels, side // 8, side // 8, device=step.precision.device)
            vae.to(step.precision.device)

            @torch.no_grad()
            def decode(latents: torch.Tensor = latents) -> None:
                vae.decode(latents)

            of_unet, of_vae = seconds(unet), seconds(decode)
            vae.to("cpu")
            renderer = Renderer(step, Schedule(), {"": path}, vae, tiled=False, in_turn=False)
            prompt = SamplePrompt("", "trigger", width=side, height=side, steps=STEPS, seed=1, guidance=6.0)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            of_training = torch.cuda.memory_reserved()
            begun = time.perf_counter()
            renderer.decoded(renderer.latents(prompt))
            first = time.perf_counter() - begun
            image = seconds(lambda renderer=renderer, prompt=prompt: renderer.decoded(renderer.latents(prompt)))
            more = torch.cuda.max_memory_reserved() - of_training
            bare = STEPS * of_unet + of_vae
            print(
                f"{side} px: UNet {1e3 * of_unet:.1f} ms for 2, VAE {1e3 * of_vae:.0f} ms, bare image {bare:.3f} s, "
                f"sample image {image:.3f} s ({image / bare:.2f} x), the first one {first:.2f} s, {more / GIB:.2f} GiB besides "
                f"{of_training / GIB:.2f} GiB of training",
                flush=True,
            )
            renderer.release()


def seconds(function: Callable[[], object]) -> float:
    """The median time of a call, after 3 that are not counted."""
    times = []
    for number in range(10):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        function()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(run_main("benchmarks.sample", main))
