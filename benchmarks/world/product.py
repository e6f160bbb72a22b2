"""The product as the benchmark runs it: its stages as they are, with settings from the environment."""

import contextlib
import gc
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import train_lora
from common.dataset_layout import DatasetFolder
from common.errors import run_main
from common.settings import REPOSITORY
from demo.environment import setting_names
from training.system.processes import die_with_parent

SAMPLES_OF_A_RUN = 2000
"""Training samples, which is what NUM_TRAIN_EPOCHS=auto takes."""
_NO_PROGRAM = "/bin/true"


def environment(model: Path, dataset: Path, output: Path, trigger: str, **settings: object) -> dict[str, str]:
    """Variables for the stages. Settings of the user's environment are removed; `settings` have names in upper case."""
    own = {
        "TRIGGER_WORD": trigger,
        "DATASET_DIR": dataset,
        "OUTPUT_DIR": output,
        "MODELS_DIR": model.parent,
        "BASE_MODEL": model,
        "FACE_MODEL": "off",
        "SAMPLES": "false",
        "VALIDATION_FRACTION": 0,
        "DATALOADER_NUM_WORKERS": 1,
        "SAVE_STATE_EVERY_MINUTES": 1000,
        "HF_HUB_OFFLINE": 1,
        "OMP_NUM_THREADS": 1,
    }
    kept = {name: value for name, value in os.environ.items() if name not in setting_names()}
    return kept | {name: str(value) for name, value in (own | settings).items()}


def length(images: int, samples: int, saves: int) -> dict[str, int]:
    """Settings of a run of that many training samples, with as many LoRA files at even distances."""
    every = max(1, round(samples / images / saves))
    return {"NUM_TRAIN_EPOCHS": every * saves, "SAVE_EVERY_EPOCHS": every}


def caption(variables: dict[str, str], log: Path) -> None:
    """Run the caption stage, unless it has captioned every image."""
    images = DatasetFolder(Path(variables["DATASET_DIR"])).images
    if all(path.with_suffix(".txt").exists() for path in images.glob("*.png")):
        return
    command = [sys.executable, REPOSITORY / "scripts" / "caption_images.py"]
    with log.open("ab") as file:
        subprocess.run(command, env=variables, stdout=file, stderr=file, check=True)


def prepare_forks() -> None:
    """Before the first fork: nothing that the children share may be copied by a collection of garbage, or be locked."""
    import training.trainer  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def fork(variables: dict[str, str], log: Path, run: Callable[[], int]) -> int:
    """Call `run` in a process of its own, whose exit code is what it returns; returns the process id.

    The libraries are imported already, which would take each process ten seconds of a core.
    """
    sys.stdout.flush()
    parent, child = os.getpid(), os.fork()
    if child:
        return child
    code = 70
    try:
        die_with_parent(parent)
        log.parent.mkdir(parents=True, exist_ok=True)
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(number, stream)
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, encoding="utf-8", closefd=False) for stream in (1, 2))  # noqa: SIM115
        os.environ.clear()
        os.environ.update(variables)
        code = run()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def train() -> int:
    """`scripts/train_lora.py` in this process, whose environment has the settings.

    Neither the processes that encode while libraries are imported nor those that write the report page are started: nothing is
    left to import, and the page is not read.
    """
    train_lora.NVIDIA = Path("/nonexistent")
    sys.executable, sys.argv = _NO_PROGRAM, ["train_lora.py"]
    return run_main(train_lora.STAGE, lambda: train_lora.main([]))
