"""Train a LoRA for SDXL on DATASET_DIR/images and write OUTPUT_DIR/lora/<name>.safetensors, which ComfyUI loads."""

import signal

if __name__ == "__main__":  # Ctrl-C while libraries are imported ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from operator import call
from pathlib import Path
from typing import Any

from common.background import in_background
from common.errors import run_main, stop_on_signals
from common.project import ComfyUIAddress, ProjectSettings
from common.settings import Request, read_request
from training.config import TrainSettings
from training.data.dataset import read_inputs
from training.system.launcher import launch, needs_launcher, rank_info
from training.system.worker_process import WorkerProcess, die_with_parent, worker_process

STAGE = "train_lora"
SECTIONS = {"project": ProjectSettings, "collect": ComfyUIAddress, "train": TrainSettings}

NVIDIA = Path("/dev/nvidiactl")
"""There if NVIDIA's driver runs."""


def main(argv: list[str]) -> None:
    stop_on_signals()
    if rank_info().world_size > 1:
        die_with_parent(rank_info().launcher_pid)  # before the imports: nobody would end a process that the launcher has left
    request = read_request(STAGE, __doc__, argv, SECTIONS, validate=validate)
    processes = request.sections["train"].processes
    if needs_launcher(processes) and not request.check:
        sys.exit(launch([sys.executable, __file__, *argv], processes))
    if rank_info().rank == 0:
        print(f"set by you: {request.overridden()}", flush=True)
    is_quick = NVIDIA.exists() and rank_info().world_size == 1 and not request.check
    with worker_process(enabled=is_quick) as reader, worker_process(import_training, enabled=is_quick) as encoder:
        train(request, reader, encoder)


def train(request: Request, reader: WorkerProcess | None, encoder: WorkerProcess | None) -> None:
    """Do what was asked for. Where there are other processes, one reads what the run starts from while this one imports, and
    the other encodes images and captions while this one makes the UNet ready."""
    project, settings = request.sections["project"], request.sections["train"]
    read = partial(reader.call_and_close if reader else call, read_inputs, project, settings)
    with in_background(read, start=rank_info().rank == 0 and not request.check) as inputs:
        import_training()
    from common.output_layout import only_run_in
    from training import job as task
    from training import preflight as doctor
    from training import trainer as carry_out
    from training.system.memory_guard import memory_guard
    from training.system.process_group import process_group

    if request.check:
        doctor.check(project, settings, inputs_pending=request.inputs_pending)
        return
    with process_group(rank_info()) as processes, only_run_in(project.output_dir) if processes.is_main_process else nullcontext():
        run = task.decide_together(processes, project, settings, inputs.result, request.sections["collect"].comfyui_endpoint)
        if run.is_finished:
            task.remove_partial_outputs(run)
            print(f"nothing to do: {run.results.lora} is finished, with exactly these settings, images and captions")
            return
        if processes.is_main_process:
            task.archive_previous_outputs(run)
        task.prepare_device(run)
        with task.translate_cuda_oom(run), memory_guard(run.room.thresholds) as guard, carry_out.coming_unet(run) as unet:
            data = carry_out.encode(run, encoder)
            modules = carry_out.train(run, data, unet(), guard)
        if processes.is_main_process:
            carry_out.finish(run, modules)


def import_training() -> None:
    """Import what takes seconds; the GPU's context is made meanwhile."""
    from training.system.device import wake_gpu

    wake_gpu(rank_info().gpu)
    import training.trainer  # noqa: F401


def validate(sections: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the settings, once each of them is right: the LoRA may be named after the trigger word."""
    saving, trigger = sections["train"].saving, sections["project"].trigger_word
    if not saving.output_name:
        yield from (f"{problem}; set OUTPUT_NAME" for problem in replace(saving, output_name=trigger).validate())


if __name__ == "__main__":
    try:
        code = run_main(STAGE, lambda: main(sys.argv[1:]))
    except SystemExit as asked:
        code = asked.code or 0
    for stream in filter(None, (sys.stdout, sys.stderr)):  # either may have been closed before the start
        stream.flush()
    os._exit(code)  # everything is on the disk; to take torch down in good order would last a second
