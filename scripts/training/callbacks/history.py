"""The history of a run: when, on what and for how long each process worked on it, and how much memory it took at most.

The report page shows it. A process that was killed has a first line and no last one.
"""

import platform
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from common.files import append_json_line
from common.settings import VERSION
from training.system.device import Precision, describe

LIBRARIES = ("torch", "diffusers", "transformers", "peft")


@contextmanager
def recorded_history(path: Path, precision: Precision, world_size: int, about: Mapping[str, Any]) -> Iterator[None]:
    """Append a line to the file `path` at the beginning, with everything in `about`, and another one at the end of the block."""
    processes = f"{world_size} x " if world_size > 1 else ""
    versions = {"LoRACat": VERSION, "Python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    if torch.version.cuda:
        versions["CUDA"] = torch.version.cuda
    device = processes + describe(precision)
    append_json_line(path, {"event": "start", "time": _now(), "device": device, "versions": versions, **about})
    begun = time.monotonic()
    try:
        yield
    finally:
        ending = {"event": "end", "time": _now(), "seconds": round(time.monotonic() - begun, 1)}
        ending["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if precision.device.type == "cuda":
            ending["peak_gpu_bytes"] = torch.cuda.max_memory_reserved(precision.device)
        with suppress(OSError):  # such as a full disk, of which the run itself has said more
            append_json_line(path, ending)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
