"""Train a LoRA for SDXL on DATASET_DIR/images and write OUTPUT_DIR/lora/<name>.safetensors, which ComfyUI loads."""

import signal

if __name__ == "__main__":  # Ctrl-C while libraries are imported ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from operator import call
from pathlib import Path

from common.background import in_background
from common.captions import ordinary_trigger, tagger_vocabulary
from common.clip_tokens import find_vocabulary
from common.dataset_layout import DatasetFolder
from common.errors import exit_on_signals, run_main, stop_on_signals
from common.output_layout import name_problem, only_run_in
from common.project import ComfyUIAddress, ProjectSettings
from common.settings import Request, read_request
from training.config import TrainSettings, unsupported_by_fast_engine
from training.data.dataset import read_inputs, require_all_images
from training.system.environment import lacks_kernels, let_segments_grow
from training.system.processes import die_with_parent, launch, needs_launcher, rank_info, worker_process

STAGE = "train_lora"
NVIDIA = Path("/dev/nvidiactl")
"""Exists if NVIDIA's driver is loaded."""
REHEARSAL_CORES = 8
"""With fewer CPU cores, one process more would hold up the others."""


@dataclass(frozen=True)
class Tables:
    """What this stage reads of the settings."""

    project: ProjectSettings
    collect: ComfyUIAddress
    train: TrainSettings

    def validate(self) -> Iterator[str]:
        """The LoRA may be named after the trigger word."""
        saving, trigger = self.train.saving, self.project.trigger_word
        if not saving.output_name:
            yield from (f"{problem}; set OUTPUT_NAME" for problem in replace(saving, output_name=trigger).validate())
        if problem := name_problem(saving.output_name or trigger, self.project.output_dir):
            yield f"output_name{'' if saving.output_name else ' (the trigger word)'}: {problem}"


def main(argv: list[str]) -> None:
    stop_on_signals()
    ranks = rank_info()
    if ranks.world_size > 1:
        die_with_parent(ranks.launcher_pid)  # before the imports: the launcher may be gone when they are done
    request = read_request(STAGE, __doc__, argv, Tables)
    project, settings = request.settings.project, request.settings.train
    if needs_launcher(settings.processes) and not request.check:
        sys.exit(launch([sys.executable, __file__, *argv], settings.processes))
    if ranks.rank == 0:
        print_settings(request)

    saves_memory = settings.model.gradient_checkpointing is True
    if saves_memory:
        let_segments_grow()

    # Worker processes read the inputs, encode the data, and compile kernels if there are none yet, while this one imports libraries
    # and loads the UNet. Where checkpointing saves memory, all of this is done by one process.
    overlaps = NVIDIA.exists() and ranks.world_size == 1 and not request.check
    encodes = overlaps and not saves_memory
    is_fast = settings.run.engine != "plain" and not unsupported_by_fast_engine(settings.lora)
    rehearses = encodes and is_fast and lacks_kernels() and len(os.sched_getaffinity(0)) >= REHEARSAL_CORES
    with (
        worker_process(enabled=overlaps) as reader,
        worker_process(import_trainer, enabled=encodes) as encoder,
        worker_process(import_trainer, enabled=rehearses) as rehearser,
    ):
        read = partial(reader.call_and_close if reader else call, read_inputs, project, settings)
        with in_background(read, start=ranks.rank == 0 and not request.check) as inputs, exit_on_signals(STAGE):
            import_training()
            from training.callbacks.report_page import write_report_page
            from training.job import TrainingJob, resolve_on_all_ranks
            from training.preflight import check
            from training.results import print_next_steps
            from training.system.device import release_memory
            from training.system.process_group import process_group
            from training.trainer import clean_up, resumed_without_fresh, train

        if request.check:
            check(project, settings, inputs_pending=request.inputs_pending)
            return
        with process_group(ranks) as group, only_run_in(project.output_dir) if group.is_main_process else nullcontext():

            def resolve() -> TrainingJob:
                run = resolve_on_all_ranks(group, project, settings, inputs.result, request.settings.collect.comfyui_endpoint)
                return replace(run, origins={key: request.sources[key] for key in request.overrides})

            run = resolve()
            if not run.is_finished and not train(run, group, encoder, rehearser):
                release_memory()  # of the networks with which it was measured what the base model predicts
                run = resolve()
                if not run.is_finished:
                    train(run, group)
            if run.is_finished and group.is_main_process:
                clean_up(run)
                print(f"nothing to do: {run.outputs.lora} is finished, with exactly these settings, images and captions")
                print_next_steps(run)
            if group.is_main_process:
                stop_on_signals()  # the loop only notes them, and asks between two steps
                with resumed_without_fresh(settings.saving.fresh):
                    write_report_page(project, settings.data)
        if ranks.rank == 0:
            require_all_images(inputs.result()[2])


def print_settings(request: Request[Tables]) -> None:
    """Print what is not the default, and warn of a trigger word that is not one of its own."""
    project, settings = request.settings.project, request.settings.train
    if not request.check:  # else it is printed already
        print(request.overridden(), flush=True)
    tags = tagger_vocabulary(DatasetFolder(project.dataset_dir).tag_cache)
    vocabulary = find_vocabulary(project.models_dir, settings.model.base_model)
    if warning := ordinary_trigger(project.trigger_word, tags, vocabulary):
        print(warning, flush=True)


def import_training() -> None:
    """Import what takes seconds, while the GPU's context is created in the background."""
    from training.system.device import wake_gpu

    wake_gpu(rank_info().gpu)
    import_trainer()


def import_trainer() -> None:
    """Import the same in a process that leaves the GPU alone until it has something to do: the free memory is not read yet."""
    import training.trainer  # noqa: F401


if __name__ == "__main__":
    try:
        code = run_main(STAGE, lambda: main(sys.argv[1:]))
    except SystemExit as exit_request:
        code = exit_request.code or 0
    for stream in filter(None, (sys.stdout, sys.stderr)):  # either may have been closed before the start
        stream.flush()
    os._exit(code)  # everything is on disk; NCCL would wait forever for the CUDA graphs that it is part of
