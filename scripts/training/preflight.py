"""`train_lora.py --check`: the GPU and its driver, memory, disk, the base model, and what a run will do."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from common.dataset_layout import DatasetFolder, find_regularization_images, select_images
from common.dataset_table import dataset_table
from common.errors import ResourceError, run_checks
from common.output_layout import OutputLayout, check_disk_space
from common.project import ProjectSettings
from common.settings import IN_CONTAINER
from training.callbacks.checkpoint import newest
from training.callbacks.sample_plan import plan_samples
from training.config import TrainSettings
from training.data.dataset import read_images, require_all_images
from training.data.examples import Example
from training.engine import choose_engine
from training.initial_lora import initial_digest, matching_layers
from training.memory_budget import fit_to_memory
from training.method.layers import adapted_layers, shapes_of_base
from training.method.optimizers import require_usable
from training.models.base_model import (
    choose_schedule,
    find_base,
    find_tokenizers,
    known_digest,
    remembered_prediction,
    require_tokenizers_on_hub,
    tokenizers_digest,
)
from training.models.family import family_of
from training.models.sdxl import BaseModel, Schedule
from training.models.weights import load_tokenizers, require_matching_weights
from training.plan import INITIAL_LORA
from training.run import Machines, find_run, outputs_of
from training.system.device import GIB, available_bytes, choose_precision

DRIVER_FILE = Path("/proc/driver/nvidia/version")
DEVICE_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""How programs reach the GPU: NVIDIA's driver on Linux, and Windows' driver under WSL."""
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")
_BF16_SINCE = (8, 0)
"""The compute capability from which on bf16 is fast."""


def check(project: ProjectSettings, settings: TrainSettings, *, inputs_pending: bool) -> None:
    """Run every check and print its result; what is wrong is raised as one list.

    `inputs_pending`: earlier stages still have to run, so images and captions may be missing.
    """
    bases: list[BaseModel] = []
    found: list[BaseModel] = []
    """The base model, if the LoRA fits it as well."""
    unusable: list[int] = []

    def check_base_model() -> str:
        base = find_base(settings.model.base_model, project.models_dir)
        require_matching_weights(base)
        if find_tokenizers(base, project.models_dir):
            load_tokenizers(base, project.models_dir)
        else:
            require_tokenizers_on_hub(project.models_dir)
        schedule, is_assumed = schedule_of(base)
        bases.append(base)
        snr = ", zero terminal SNR" if schedule.zero_terminal_snr else ""
        how = ", which the first run measures" if is_assumed else ""
        return f"base model: {base.path}, {family_of(base)}; {schedule.prediction_type}{snr}{how}"

    def schedule_of(base: BaseModel) -> tuple[Schedule, bool]:
        cache = OutputLayout(project.output_dir, "").cache
        measured = remembered_prediction(cache, known_digest(base, cache, "unet"))
        return choose_schedule(base, settings.model.prediction_type, settings.model.zero_terminal_snr, measured)

    def check_layers() -> str:
        layers = adapted_layers(shapes_of_base(bases[0], settings.lora), settings.lora) if bases else ()
        found.extend(bases)
        return f"LoRA: {len(layers)} layers" if bases else "LoRA: the layers are checked when there is a base model"

    def check_run() -> str:
        dataset = DatasetFolder(project.dataset_dir)
        files = select_images(dataset), find_regularization_images(dataset)
        if inputs_pending:
            images = files[0].images
            without = sum(not image.has_caption for image in images)
            if without or not images:
                return f"images: {len(images)} so far, {without} without a caption; the run is planned when all are there"
        else:
            print(dataset_table(dataset, *files, project.trigger_word), flush=True)
        examples, left_out = read_images(project, settings.data, files)
        unusable.append(left_out)
        if not found:
            return f"images: {len(examples)} with captions in {project.dataset_dir}"
        return describe_run(project, settings, found[0], examples)

    checks = [check_processor, check_memory, lambda: check_disk_space(project.output_dir), lambda: check_method(settings)]
    checks += [check_base_model, check_layers, lambda: check_initial_lora(project, settings, found), check_run]
    run_checks("training cannot start:", checks)
    require_all_images(sum(unusable))


def check_initial_lora(project: ProjectSettings, settings: TrainSettings, bases: Sequence[BaseModel]) -> str:
    """Whether a new run can begin from the file INIT_LORA on the base model in `bases`, if there is one."""
    if settings.lora.init_lora is None:
        return "begins from: a new LoRA"
    outputs = outputs_of(project, settings)
    saved = None if settings.saving.fresh else newest(outputs.state)
    initial_digest(settings.lora, outputs, saved.identity.fingerprint.get(INITIAL_LORA) if saved else None)
    if bases and not saved:
        matching_layers(settings.lora, shapes_of_base(bases[0], settings.lora))
    return f"begins from: {settings.lora.init_lora}"


def check_method(settings: TrainSettings) -> str:
    """Whether the engine supports the settings, and the optimizer can be used."""
    engine, reason = choose_engine(settings.run.engine, settings.lora)
    optimizer = settings.optimizer.optimizer
    require_usable(optimizer, choose_precision(settings.model.mixed_precision).device)
    return f"LoRA: {settings.lora.describe()}; engine: {engine} ({reason}); optimizer: {optimizer}"


def describe_run(project: ProjectSettings, settings: TrainSettings, base: BaseModel, examples: list[Example]) -> str:
    """What a run would do and where it would begin, with which sample images, and on a GPU how much memory a step would need.
    Raises SettingsError for a run that would be refused whatever the memory."""
    cache, tokenizers = outputs_of(project, settings).cache, find_tokenizers(base, project.models_dir)
    digests = {part: known_digest(base, cache, part) for part in base.components}
    digests["tokenizers"] = tokenizers_digest(tokenizers) if tokenizers else None
    precision, machine = choose_precision(settings.model.mixed_precision), settings.processes
    machines = Machines(precision, machine.num_machines * machine.num_processes, machine.num_processes)
    run = find_run(project, settings, base, examples, machines, digests)
    if run.begins_from_file:
        matching_layers(settings.lora, shapes_of_base(base, settings.lora))
    settings, lines = run.settings, [*run.lines, run.plan.announcement()]
    refusal = []
    if precision.device.type == "cuda" and not run.is_finished:
        try:
            settings = fit_to_memory(settings, run.budget, "")
        except ResourceError as error:  # other programs may still end
            refusal = [f"a run would be refused now: {error}"]
    samples, _ = plan_samples(settings, project.trigger_word, run.plan, run.budget, base, run.recorded)
    lines += [samples.announcement] if samples else []
    if run.is_finished:
        lines.append("this run is finished: there is nothing to do")
    elif run.saved:
        lines.append(f"a run would continue at step {run.saved.progress.next_step}")
    return "\n".join([*lines, *refusal])


def check_processor() -> str:
    """The GPU that training would use, with driver and torch. Raises ResourceError if this torch cannot use the GPU."""
    version = f"torch {torch.__version__}"
    if not any(file.exists() for file in DEVICE_FILES):
        return f"GPU: none; training would run on the CPU in fp32, which is only useful for tests ({version}{_why_no_gpu()})"
    if torch.version.cuda is None:
        raise ResourceError(
            f"{version} is built without CUDA, but there is an NVIDIA GPU: install a CUDA build, or use the container"
        )
    try:
        torch.cuda.init()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(
            f"{version} cannot use the GPU with driver {driver_version()}: {reason}; update the driver or use an older BASE_IMAGE"
        ) from None
    capability = torch.cuda.get_device_capability()
    architectures = torch.cuda.get_arch_list()
    name = f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}, driver {driver_version()}"
    if not has_code_for(capability, architectures):
        supported = ", ".join(architectures)
        raise ResourceError(f"{name}: {version} supports only {supported}; build the container with a newer BASE_IMAGE")
    slow = "" if capability >= _BF16_SINCE else "; bf16 is slow on it: set MIXED_PRECISION=fp16"
    return f"GPU: {name}, {version}{slow}"


def check_memory() -> str:
    """How much memory training can use, and whether CPU and GPU share it."""
    if not torch.cuda.is_available():
        return f"memory: {available_bytes(torch.device('cpu')) / GIB:.0f} GiB available"
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    kind = "shared by CPU and GPU" if properties.is_integrated else "on the GPU"
    return f"memory: {available_bytes(device) / GIB:.0f} GiB available of {properties.total_memory / GIB:.0f} GiB {kind}"


def has_code_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a torch built for `architectures` (`sm_90`, `compute_120`, ...) runs on a GPU of this compute capability.

    Machine code (sm) runs on its major version from its minor version on, PTX (compute) on everything newer. The suffix a binds
    code to exactly one version, f to its major version (CUDA programming guide, "Compute Capability").
    """
    for kind, major, minor, suffix in (match.groups() for match in map(_ARCHITECTURE.fullmatch, architectures) if match):
        version = (int(major), int(minor))
        if suffix == "a":
            runs = capability == version
        elif kind == "sm" or suffix == "f":
            runs = capability[0] == version[0] and capability[1] >= version[1]
        else:
            runs = capability >= version
        if runs:
            return True
    return False


def driver_version() -> str:
    """The version of NVIDIA's kernel module, such as 580.95.05."""
    text = DRIVER_FILE.read_text(encoding="utf-8") if DRIVER_FILE.exists() else ""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else "of unknown version"


def _why_no_gpu() -> str:
    """Why no GPU is visible although NVIDIA's driver is loaded."""
    if not DRIVER_FILE.exists():
        return ""
    if IN_CONTAINER:
        return "; this machine has a GPU: the service loracat can use it, loracat-cpu cannot"
    return f"; driver {driver_version()} is loaded, but /dev/nvidiactl is missing: run nvidia-smi once"
