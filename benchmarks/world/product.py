"""The product as the benchmark runs it: its stages as they are, with settings from the environment, in processes of their own."""

import contextlib
import gc
import os
import pickle
import subprocess
import sys
import tempfile
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
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        subprocess.run(command, env=variables, stdout=file, stderr=file, check=True)


def prepare_forks() -> None:
    """Before the first fork: nothing that the children share may be copied by a collection of garbage, or be locked.

    Nor may this process ask CUDA for anything: where it has, its forks cannot use a GPU. `torch.cuda.is_available`, which libraries
    call when they are imported, asks the driver's management library alone if PYTORCH_NVML_BASED_CUDA_CHECK is set.
    """
    import training.trainer  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def start(variables: dict[str, str], log: Path, run: Callable[[], int], *, forks: bool) -> int:
    """Call `run` in a process of its own, whose exit code is what it returns; returns the process id.

    A fork has imported the libraries already, which takes other processes ten seconds and more of a core. But forks can use a GPU
    only if this process has never asked for one, which a library may do when it is imported.
    """
    sys.stdout.flush()
    log.parent.mkdir(parents=True, exist_ok=True)
    number, parent = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), os.getpid()
    try:
        if not forks:
            descriptor, path = tempfile.mkstemp()
            with open(descriptor, "wb") as file:
                pickle.dump(run, file)
            command = [sys.executable, "-m", "benchmarks.world.product", path, str(parent)]
            streams = [(os.POSIX_SPAWN_DUP2, number, stream) for stream in (1, 2)]
            return os.posix_spawn(sys.executable, command, variables, file_actions=streams)
        child = os.fork()
        if not child:
            for stream in (1, 2):
                os.dup2(number, stream)
            sys.stdout, sys.stderr = (open(each, "w", buffering=1, encoding="utf-8", closefd=False) for each in (1, 2))  # noqa: SIM115
            os.environ.clear()
            os.environ.update(variables)
            _call(run, parent)
        return child
    finally:
        os.close(number)


def _call(run: Callable[[], int], parent: int) -> None:
    """End this process with what `run` returns, and with its parent."""
    code = 70
    try:
        die_with_parent(parent)
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


if __name__ == "__main__":  # a process that `start` has spawned
    pickled = Path(sys.argv[1])
    content = pickled.read_bytes()
    pickled.unlink()
    _call(pickle.loads(content), int(sys.argv[2]))
