"""`python -m benchmarks.train`: how fast this GPU trains a LoRA, measured as a user experiences it. Needs CUDA.

Builds a full-size SDXL with random weights and generated images in a folder (15 GB), runs `scripts/train_lora.py` on
them, and derives the time per step and the fixed cost from the times of the log lines.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from common.errors import run_main
from common.project import ProjectSettings
from common.settings import REPOSITORY, all_keys
from demo import tiny_sdxl
from training.config import TrainSettings
from training.preflight import driver_version

ONE_BUCKET = ((1024, 1024),)
SIX_BUCKETS = ((1024, 1024), (896, 1152), (1152, 896), (832, 1216), (1216, 832), (768, 1344))
STEP_TFLOP_PER_IMAGE = 14.7
"""Forward and backward pass of the UNet at 1024 x 1024 with the gradients of the LoRA, computed from the sizes of the layers."""
TIMED_STEPS = 120
"""At batch 4; with other batch sizes, the same number of images."""
TAGS = "1girl, smile, brown hair, blue eyes, outdoors, tree, standing, upper body, looking at viewer, white shirt"


@dataclass(frozen=True)
class Job:
    """One run of train_lora.py."""

    name: str
    images: str
    """Folder of the data set."""
    epochs: int
    settings: dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/loracat-benchmark"), help="working folder (15 GB)")
    parser.add_argument("--only", default="", help="regular expression: run only measurements whose names match")
    options = parser.parse_args()
    require_gpu()
    build(options.folder)
    rate, imports = matmul_tflops(), seconds_of_imports()
    print(
        f"{machine()}, matrix products {rate:.0f} TFLOP/s in bf16, memory {copied_gb_per_s():.0f} GB/s, imports {imports:.1f} s\n"
    )
    torch.cuda.empty_cache()
    selected = re.compile(options.only)
    if selected.search(FIRST_JOB):
        delete_compiled_kernels()
        print(whole_job(options.folder, FIRST_JOB), flush=True)
    if selected.search(SECOND_JOB):
        if not selected.search(FIRST_JOB):
            run(options.folder, Job("compile the kernels", "one", 1, JOB_SETTINGS))
        print(whole_job(options.folder, SECOND_JOB), flush=True)
    print(TABLE_HEADER, flush=True)
    for name, images, batch, settings in MEASUREMENTS:
        if selected.search(name):
            print(measure(options.folder, name, images, batch, settings, rate, imports), flush=True)
    if selected.search("inside a step"):
        subprocess.run([sys.executable, "-m", "benchmarks.step", options.folder / "models" / "random-sdxl"], check=True)


TABLE_HEADER = """| | step, ms | images/s | TFLOP/s | GPU memory, GiB | fixed cost, s | fixed cost / imports |
|---|---|---|---|---|---|---|"""
FIRST_JOB, SECOND_JOB = "job, first run on this machine", "job, kernels already compiled"
JOB_SETTINGS = {"train_batch_size": 4, "gradient_checkpointing": "auto"}
"""The defaults of these settings."""
SMALL_CARD = {"gradient_checkpointing": "true", "base_quantization": "int8", "lora_rank": 16}
MEASUREMENTS = (
    ("batch 4", "one", 4, {}),
    ("batch 1", "one", 1, {}),
    ("batch 4, checkpointing", "one", 4, {"gradient_checkpointing": "true"}),
    ("batch 1, fp16", "one", 1, {"mixed_precision": "fp16"}),
    ("batch 1, checkpointing", "one", 1, {"gradient_checkpointing": "true"}),
    ("batch 1, int8, rank 16", "one", 1, SMALL_CARD),
    ("batch 1, int8, rank 16, adamw8bit", "one", 1, SMALL_CARD | {"optimizer": "adamw8bit"}),
    ("batch 4, six buckets", "six", 4, {}),
)
"""Name, images, batch size, further settings. Gradient checkpointing is off unless stated otherwise."""


def require_gpu() -> None:
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs an NVIDIA GPU")


def build(folder: Path) -> None:
    """Build the base model and the two data sets, unless they exist."""
    if (folder / "complete").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    tiny_sdxl.build(folder / "models" / "random-sdxl", size=tiny_sdxl.FULL, device="cuda")
    torch.cuda.empty_cache()
    for name, sizes, count in (("one", ONE_BUCKET, 32), ("six", SIX_BUCKETS, 48)):
        images = folder / name / "images"
        images.mkdir(parents=True)
        for number in range(count):
            image(sizes[number % len(sizes)], number).save(images / f"{number:02d}.png")
            (images / f"{number:02d}.txt").write_text(f"trigger, {TAGS}, number {number}", encoding="utf-8")
    (folder / "complete").touch()
    print(f"built in {time.monotonic() - started:.0f} s", flush=True)


def image(size: tuple[int, int], seed: int) -> Image.Image:
    """An image of soft colours with some grain."""
    generator = torch.Generator().manual_seed(seed)
    soft = torch.rand(1, 3, 8, 8, generator=generator)
    pixels = torch.nn.functional.interpolate(soft, size=size[::-1], mode="bicubic", align_corners=False)
    pixels = pixels + 0.02 * torch.randn(pixels.shape, generator=generator)
    return Image.fromarray((pixels[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def matmul_tflops() -> float:
    """TFLOP/s of a large bf16 matrix product on this GPU."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        a @ b
    end.record()
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (begin.elapsed_time(end) / 1e3) / 1e12


def copied_gb_per_s() -> float:
    """GB/s that this GPU reads and writes when it copies its own memory."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    copy.copy_(source)
    begin.record()
    for _ in range(10):
        copy.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 20 * source.numel() / (begin.elapsed_time(end) / 1e3) / 1e9


def seconds_of_imports() -> float:
    """How long this machine takes to import the libraries of a training run, the faster of two times."""
    times = []
    for _ in range(2):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch, diffusers, transformers, peft"], check=True)
        times.append(time.monotonic() - started)
    return min(times)


def machine() -> str:
    """GPU, driver, CPU and torch."""
    cpu = re.search(r"^(?:model name|Model name)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return (
        f"{torch.cuda.get_device_name()}, driver {driver_version()}, {cpu[1] if cpu else platform.machine()} x {os.cpu_count()}, "
        f"torch {torch.__version__}"
    )


def gpu_memory_in_use() -> int:
    """MiB in use on the GPU, by all programs, as nvidia-smi sees it; 0 where it does not say (memory shared with the CPU)."""
    gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={gpu}"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return int(output) if output.isdecimal() else 0


@contextmanager
def peak_of_gpu_memory() -> Iterator[list[int]]:
    """A list whose only element is the highest use of GPU memory within this block, in MiB, less what was in use before."""
    before, peak, ended = gpu_memory_in_use(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            peak[0] = max(peak[0], gpu_memory_in_use() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def run(folder: Path, job: Job) -> tuple[float, str]:
    """Run train_lora.py from scratch; return the seconds it took and its output, each line with its time."""
    code, took, log = attempt(folder, job)
    if code:
        sys.exit(f"{job.name}: train_lora.py ended with exit code {code}\n{log}")
    return took, log


def attempt(folder: Path, job: Job, *arguments: str) -> tuple[int, float, str]:
    """The same with the exit code in front, whatever it is, and with `arguments` on the command line."""
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    names = {key.name.upper() for section in (ProjectSettings, TrainSettings) for key in all_keys(section)}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    of_benchmark = {
        "trigger_word": "trigger",
        "dataset_dir": folder / job.images,
        "output_dir": output,
        "models_dir": folder / "models",
        "base_model": "random-sdxl",
        "num_train_epochs": job.epochs,
        "save_every_epochs": 0,
        "gradient_checkpointing": "false",
        "validation_fraction": 0,
        "samples": "false",
    }
    changed = {name.upper(): str(value) for name, value in (of_benchmark | job.settings).items() if name.upper() in names}
    command = [sys.executable, REPOSITORY / "scripts" / "train_lora.py", *arguments]
    started, lines = time.monotonic(), []
    process = subprocess.Popen(command, env=kept | changed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        lines.append(f"{time.monotonic() - started:8.2f} s  {line.rstrip()}")
    code = process.wait()
    log = "\n".join(lines)
    (folder / f"{re.sub('[^a-z0-9]+', '-', job.name)}.log").write_text(log, encoding="utf-8")
    return code, time.monotonic() - started, log


def measure(folder: Path, name: str, images: str, batch: int, settings: dict[str, object], rate: float, imports: float) -> str:
    """One row of the table. A short run first compiles missing kernels; then a long run is timed by its log lines, from the
    end of its second epoch on, when every shape has been captured. `rate`: TFLOP/s of matrix products alone;
    `imports`: seconds of importing the libraries."""
    count = {"one": 32, "six": 48}[images]
    per_epoch = count // batch
    epochs = 2 + -(-TIMED_STEPS * 4 // batch // per_epoch)
    for length in (2, epochs):
        job = Job(f"{name}, {length} epochs", images, length, {"train_batch_size": batch} | settings)
        with peak_of_gpu_memory() as peak:
            took, log = run(folder, job)
    ends = [float(seconds) for seconds in re.findall(r"^ *([\d.]+) s  epoch ", log, re.MULTILINE)]
    step_s = (ends[-1] - ends[1]) / ((epochs - 2) * per_epoch)
    fixed_s = took - epochs * per_epoch * step_s
    tflops = batch * STEP_TFLOP_PER_IMAGE / step_s
    return (
        f"| {name} | {1e3 * step_s:.1f} | {batch / step_s:.2f} | {tflops:.0f} ({tflops / rate:.0%}) | {peak[0] / 1024:.2f} | "
        f"{fixed_s:.1f} | {fixed_s / imports:.2f} |"
    )


def whole_job(folder: Path, name: str) -> str:
    """Run the job, 32 images, 20 epochs, batch 4, and return its time and log."""
    took, log = run(folder, Job(name, "one", 20, JOB_SETTINGS))
    return f"{name:32s} {took:6.1f} s\n{log}"


def delete_compiled_kernels() -> None:
    """Delete what Triton and the driver have compiled, as on a new machine."""
    for cache in (os.environ.get("TRITON_CACHE_DIR"), Path.home() / ".triton" / "cache", Path.home() / ".nv" / "ComputeCache"):
        if cache:
            shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(run_main("benchmarks.train", main))
