"""Trains and measures many LoRAs at once, on several GPUs and within a time limit.

Each training is a fork of this process; beside them, some processes measure what has been trained. They find their work in a
folder: a file with the name of a run appears there when the run has ended, and the process that renames it first measures it.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.world import product
from benchmarks.world.artist import Artist
from benchmarks.world.measures import Judge, render
from benchmarks.world.picks import picks_of
from benchmarks.world.runs import Run, World
from common.files import write_json

POLL_S = 0.05
PROBE_S = 60.0
"""The Multi-Process Service answers within this time, or is not used."""


@dataclass
class Limits:
    """How much at once, and until when."""

    gpus: Sequence[str]
    """Indices, or [""] for the CPU."""
    jobs: int
    """Trainings at once on all GPUs."""
    measurers: int
    """Measuring processes on each GPU."""
    seconds: float
    reserve: float = 20.0
    """Seconds at the end, for what is measured last; what is still training by then is killed."""
    forks: bool = True
    """Whether processes can be forks of this one."""
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)


def run_all(runs: Sequence[Run], limits: Limits, counts: dict[str, int]) -> None:
    """Train and measure what has no result yet, as far as time permits."""
    runs = [run for run in runs if not run.result.exists()]
    if not runs:
        return
    world = runs[0].world
    queue = world.work / "queue"
    shutil.rmtree(queue, ignore_errors=True)
    queue.mkdir(parents=True)
    variables = dict(os.environ)
    datasets = {run.dataset.root: run for run in runs}.values()
    prepared = [Job(run.name, "data set", variables, run.log, run.prepare) for run in datasets]
    run_jobs(prepared, limits, lambda name, code, seconds: None)
    print(f"{len(datasets)} data sets after {limits.seconds - limits.left:.0f} s; {len(runs)} runs", flush=True)
    by_name = {run.name: run for run in runs}
    measuring = []
    for gpu in limits.gpus:
        for number in range(limits.measurers):
            log = world.work / "logs" / f"measure-{gpu or 'cpu'}-{number}.log"
            loop = partial(_measure_loop, world, by_name, queue, counts)
            measuring.append(product.start(variables | {"CUDA_VISIBLE_DEVICES": gpu}, log, loop, forks=limits.forks))

    def ended(name: str, code: int, seconds: float) -> None:
        if code:
            print(f"{name}: exit code {code}, see {by_name[name].log}", flush=True)
            return
        write_json(by_name[name].output / "seconds.json", round(seconds, 2))
        (queue / name).touch()

    run_jobs([Job(run.name, run.arm.name, run.variables(), run.log, run.train) for run in runs], limits, ended)
    (queue / ".end").touch()
    print(f"trained after {limits.seconds - limits.left:.0f} s; {len(os.listdir(queue)) - 1} wait to be measured", flush=True)
    for process in measuring:
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            if limits.left < 0:
                os.kill(process, signal.SIGKILL)
            time.sleep(POLL_S)
    done = sum(run.result.exists() for run in runs)
    print(f"{done} of {len(runs)} runs measured after {limits.seconds - limits.left:.0f} s", flush=True)


def computes(folder: Path, limits: Limits, **changes: object) -> bool:
    """Whether processes can use every GPU; `changes` of the limits under which they are started."""
    codes, log = [], folder / "probe.log"
    probes = [Job(gpu, "probe", dict(os.environ), log, _compute) for gpu in limits.gpus]
    how = {"gpus": limits.gpus, "jobs": len(limits.gpus), "measurers": 0, "seconds": PROBE_S, "reserve": 1, "forks": limits.forks}
    run_jobs(probes, Limits(**how | changes), lambda name, code, seconds: codes.append(code))
    return not any(codes)


def _compute() -> int:
    """Whether the GPU does, as an exit code."""
    return int(torch.ones(1000, device="cuda").sum().item() != 1000)


@contextmanager
def shared_gpus(folder: Path, limits: Limits) -> Iterator[None]:
    """Within this block processes share the GPUs through NVIDIA's Multi-Process Service, so that the kernels of several run at the
    same time; without it, with a line that says so, if it does not work. It belongs to this user and changes no setting of the
    GPUs."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    if not _control_service(["-d"], variables):
        print("GPUs: one process at a time (there is no Multi-Process Service)", flush=True)
        yield
        return
    os.environ.update(variables)
    try:
        if computes(folder, limits):
            print("GPUs: several processes at once", flush=True)
        else:
            print(f"GPUs: one process at a time (see {folder / 'probe.log'})", flush=True)
            _leave(variables)
        yield
    finally:
        _leave(variables)
        _control_service([], variables, b"quit -t 5\n")


def _leave(variables: dict[str, str]) -> None:
    for name in variables:
        os.environ.pop(name, None)


def _control_service(arguments: Sequence[str], variables: dict[str, str], text: bytes = b"") -> bool:
    """Whether the control of the Multi-Process Service did what it was asked for."""
    control = shutil.which("nvidia-cuda-mps-control")
    with suppress(subprocess.TimeoutExpired):
        how = {"input": text, "env": os.environ | variables, "timeout": PROBE_S}
        return control is not None and subprocess.run([control, *arguments], **how).returncode == 0
    return False


class Job(NamedTuple):
    """What is run in a process of its own."""

    name: str
    kind: str
    """Jobs of a kind take as long as each other."""
    variables: dict[str, str]
    log: Path
    call: Callable[[], int]
    """Returns an exit code."""


def run_jobs(jobs: Sequence[Job], limits: Limits, ended: Callable[[str, int, float], None]) -> None:
    """Run jobs as forks, each on the GPU that has the fewest. None is started that would not end in time, judged by the longest of
    its kind so far; `ended` is called with name, exit code and seconds of each that ends."""
    running: dict[int, tuple[Job, str, float]] = {}
    waiting, longest = list(jobs), {}

    def fits(job: Job) -> bool:
        return limits.left > limits.reserve + 1.2 * longest.get(job.kind, 0)

    while waiting or running:
        while len(running) < limits.jobs and (job := next(filter(fits, waiting), None)):
            waiting.remove(job)
            busy = [gpu for _, gpu, _ in running.values()]
            gpu = min(limits.gpus, key=busy.count)
            process = product.start(job.variables | {"CUDA_VISIBLE_DEVICES": gpu}, job.log, job.call, forks=limits.forks)
            running[process] = job, gpu, time.monotonic()
        if not running:
            print(f"{len(waiting)} runs are not started: the time is up", flush=True)
            return
        for process in list(running):
            pid, status = os.waitpid(process, os.WNOHANG)
            if not pid:
                continue
            job, _, began = running.pop(process)
            seconds = time.monotonic() - began
            longest[job.kind] = max(longest.get(job.kind, 0), seconds)
            ended(job.name, os.waitstatus_to_exitcode(status), seconds)
        if limits.left < limits.reserve:
            for process in running:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(POLL_S)


def _measure_loop(world: World, runs: dict[str, Run], queue: Path, counts: dict[str, int]) -> int:
    """Measure runs of the queue until it has ended."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    artist, reader, judges = Artist(world.model, world.side, device), world.reader(device), {}
    while True:
        is_last = (queue / ".end").exists()
        names = sorted((path for path in queue.iterdir() if not path.name.startswith(".")), key=lambda path: path.stat().st_mtime)
        for path in names:
            with suppress(FileNotFoundError):
                path.rename(queue / f".{path.name}")
                run = runs[path.name]
                if run.number not in judges:
                    judges[run.number] = Judge(run.subject, artist, reader, counts)
                write_json(run.result, measured(run, judges[run.number]))
                shutil.rmtree(run.output)
                break
        else:
            if is_last:
                return 0
            time.sleep(10 * POLL_S)


def measured(run: Run, judge: Judge) -> dict[str, object]:
    """Everything that is known of a run that has been trained."""
    started, saves = time.monotonic(), []
    batch = run.arm.images
    for epochs, path in run.saves().items():
        with judge.artist.with_lora(path):
            images = render(judge.artist, judge.prompts, run.subject.trigger)
        saves.append({"epochs": epochs, "samples": epochs * batch, **judge.measure(images)})
    return {
        "arm": run.arm.name,
        "subject": run.number,
        "seed": run.seed,
        "rate": run.world.rate,
        "seconds": float((run.output / "seconds.json").read_text()),
        "measuring_seconds": round(time.monotonic() - started, 2),
        "saves": saves,
        "base": judge.base,
        "drawn": judge.drawn,
        **picks_of(run, judge),
    }
