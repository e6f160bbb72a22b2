"""The doctor of the training stage: what this machine is, whether all that training needs is there, what a run will take."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from common.dataset_layout import DatasetFolder, find_images
from common.errors import ResourceError, run_checks
from common.output_layout import require_room
from common.project import ProjectSettings
from training.config import TrainSettings
from training.data.dataset import read_images
from training.memory_budget import MemoryBudget, measure_budget, resolve_batch_size
from training.models.base_model import find_base, find_tokenizers, require_tokenizers_on_hub
from training.models.loading import load_tokenizers, require_matching_weights
from training.models.sdxl import BaseModel
from training.plan import make_plan
from training.system.device import GIB, available_bytes, choose_precision

DRIVER_FILE = Path("/proc/driver/nvidia/version")


DEVICE_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""What programs reach the GPU through: NVIDIA's driver on Linux, Windows' under WSL."""


_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


_BF16_SINCE = (8, 0)


_IN_CONTAINER = Path("/.dockerenv")


def check(project: ProjectSettings, settings: TrainSettings, *, is_ahead: bool) -> None:
    """Answer everything, or raise one list of what is wrong. `is_ahead`: stages before this one still bring what is missing."""
    found: list[BaseModel] = []

    def base_model() -> str:
        base = find_base(settings.model.base_model, project.models_dir)
        require_matching_weights(base)
        if find_tokenizers(base, project.models_dir):
            load_tokenizers(base, project.models_dir)
        else:
            require_tokenizers_on_hub(project.models_dir)
        found.append(base)
        return f"base model {base.path}, {base.schedule.prediction_type}"

    def run() -> str:
        yet_to_come = images_to_come(project) if is_ahead else ""
        if yet_to_come:
            return yet_to_come
        examples = read_images(project, settings.data)
        if not found:
            return f"{len(examples)} images with captions in {project.dataset_dir}"
        schedule = found[0].schedule.with_settings(settings.model.prediction_type, settings.model.zero_terminal_snr)
        precision = choose_precision(settings.model.mixed_precision)
        room = measure_budget(found[0], examples, settings, precision, processes=1)
        with_number = resolve_batch_size(settings, room, len(examples))
        lines = [make_plan(examples, with_number, schedule).announcement()]
        if precision.device.type == "cuda":
            lines.append(memory_needed(with_number.run.train_batch_size, room))
        return "\n".join(lines)

    run_checks("training cannot run:", [processor, memory, lambda: require_room(project.output_dir), base_model, run])


def images_to_come(project: ProjectSettings) -> str:
    """What the stages before training still bring, or nothing."""
    images = find_images(DatasetFolder(project.dataset_dir).images)
    without = sum(not image.caption_path.exists() for image in images)
    if images and not without:
        return ""
    return f"{len(images)} images so far, {without} without a caption: what a run takes is known when they are there"


def memory_needed(batch: int, room: MemoryBudget) -> str:
    """What a step takes of a GPU's memory, in one line."""
    kept, recomputed = (f"{room.needed(batch, checkpointing=switch) / GIB:.0f} GiB" for switch in (False, True))
    return f"A step of batch size {batch} takes about {kept} if it keeps its activations, {recomputed} with gradient checkpointing."


def processor() -> str:
    """Which processor training would run on, with which driver and torch. Raises ResourceError when there is a GPU that
    this torch cannot use."""
    if not any(file.exists() for file in DEVICE_FILES):
        return f"{_torch()}: no NVIDIA GPU here, training would run on the CPU in fp32, which is for trying things out{_no_gpu()}"
    if torch.version.cuda is None:
        raise ResourceError(f"there is an NVIDIA GPU, but {_torch()} is built without CUDA: install one with, or use the container")
    try:
        torch.cuda.init()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(
            f"{_torch()} cannot use the GPU, driver {driver_version()}: {reason}; update the driver or take an older BASE_IMAGE"
        ) from None
    capability = torch.cuda.get_device_capability()
    built_for = torch.cuda.get_arch_list()
    name = f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}, driver {driver_version()}"
    if not has_code_for(capability, built_for):
        raise ResourceError(f"{name}: {_torch()} has code for {', '.join(built_for)} only; build with a newer BASE_IMAGE")
    slow = "" if capability >= _BF16_SINCE else "; it is slow in bf16: set MIXED_PRECISION=fp16"
    return f"{name}; {_torch()} has code for it{slow}"


def memory() -> str:
    """How much memory training may take, and whether CPU and GPU share it."""
    if not torch.cuda.is_available():
        return f"{available_bytes(torch.device('cpu')) / GIB:.0f} GiB of memory are available"
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    kind = "shared by CPU and GPU" if properties.is_integrated else "of the GPU's own"
    return f"{properties.total_memory / GIB:.0f} GiB of memory {kind}, {available_bytes(device) / GIB:.0f} GiB of it available"


def has_code_for(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether a torch built for these architectures (`sm_90`, `compute_120`, ...) runs on a GPU of `capability`.

    Machine code runs on its major version from its minor version on, PTX on everything newer; the suffix a binds code to
    exactly one version, f to its major version (CUDA programming guide, "Compute Capability").
    """
    return any(_runs_on(capability, *match.groups()) for match in map(_ARCHITECTURE.fullmatch, built_for) if match)


def _runs_on(capability: tuple[int, int], kind: str, major: str, minor: str, suffix: str) -> bool:
    version = (int(major), int(minor))
    if suffix == "a":
        return capability == version
    if kind == "sm" or suffix == "f":
        return capability[0] == version[0] and capability[1] >= version[1]
    return capability >= version


def driver_version() -> str:
    """The version of NVIDIA's kernel module, such as 580.95.05."""
    text = DRIVER_FILE.read_text(encoding="utf-8") if DRIVER_FILE.exists() else ""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else "of unknown version"


def _torch() -> str:
    return f"torch {torch.__version__}"


def _no_gpu() -> str:
    """Why there may be none although the machine has one."""
    if not DRIVER_FILE.exists():
        return ""
    if _IN_CONTAINER.exists():
        return "; this machine has one, which the service loracat gets and loracat-cpu does not"
    return f"; the driver {driver_version()} is loaded, but /dev/nvidiactl is missing: run nvidia-smi once"
