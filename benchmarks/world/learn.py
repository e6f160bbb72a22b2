"""`python -m benchmarks.world.learn`: trains LoRAs of people whom the base model has never seen, and measures what they learn.

`runs` trains and measures many on all GPUs, continues what an earlier call has begun, and ends within its time; `report` makes
tables of results; `demo` runs the whole pipeline once, as a user does. The base model and the reader are those of
`python -m benchmarks.world.pretrain`.
"""

import os

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # before torch: see product.prepare_forks

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from benchmarks.world import product
from benchmarks.world.demonstration import ARM, demonstrate
from benchmarks.world.measures import COUNTS
from benchmarks.world.recipes import BASE, ROUNDS, Arm
from benchmarks.world.report import read_results, report
from benchmarks.world.runs import Run, World, runs_of
from benchmarks.world.scheduler import Job, Limits, computes, run_all, run_jobs, shared_gpus

RATE_SUBJECTS, NEARLY = 3, 0.9
"""Of the trainings that find the learning rate: how many people, and which share of the best likeness is enough."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world.learn", description=__doc__)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("runs", help="train and measure")
    runs.set_defaults(call=train_and_measure)
    _add_world(runs)
    runs.add_argument("--round", nargs="+", choices=ROUNDS, default=list(ROUNDS))
    runs.add_argument("--arms", nargs="*", help="only these of the rounds, by name")
    runs.add_argument("--subjects", type=int, default=5)
    runs.add_argument("--seeds", type=int, default=3)
    runs.add_argument("--jobs", type=int, default=40, help="trainings at once")
    runs.add_argument("--measurers", type=int, default=2, help="measuring processes on each GPU")
    runs.add_argument("--gpus", default="0", help='indices, such as 0,1,2,3; "" for the CPU')
    runs.add_argument("--seconds", type=float, default=480, help="after which nothing is running")
    runs.add_argument(
        "--mps", action="store_true", help="let processes use a GPU at the same time, by NVIDIA's Multi-Process Service"
    )
    runs.add_argument("--rate", type=float, help="learning rate of the base recipe; else it is found first")
    runs.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4, 1e-3], help="that are tried then")
    runs.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of every training")
    runs.add_argument("--images", type=int, help="of each data set, for a trial")
    runs.add_argument("--samples", type=int, help="training samples of each run, for a trial")
    runs.add_argument("--counts", type=int, nargs=3, default=list(COUNTS.values()), help=f"samples: {', '.join(COUNTS)}")
    once = commands.add_parser("demo", help="run.sh --caption --train for one person, and what its samples show")
    once.set_defaults(call=show_one)
    _add_world(once)
    once.add_argument("--subject", type=int, default=0)
    once.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    once.add_argument("--sheet", type=Path, help="image file to write, with samples of every LoRA")
    tables = commands.add_parser("report", help="print tables of results")
    tables.set_defaults(call=lambda given: print_tables(given.folders, given.base))
    tables.add_argument("folders", type=Path, nargs="+")
    tables.add_argument("--base", default=BASE.name, help="the recipe that the others are compared with")
    given = parser.parse_args()
    given.call(given)


def print_tables(folders: Sequence[Path], base: str) -> None:
    """Print the tables of all results in `folders`."""
    results = read_results(folders)
    if not results:
        sys.exit(f"no results in {', '.join(map(str, folders))}")
    print(report(results, base))


def show_one(given: argparse.Namespace) -> None:
    """One person, by the whole pipeline."""
    sys.exit(demonstrate(Run(ARM, given.subject, 0, replace(world_of(given), rate=given.rate)), given.sheet))


def _add_world(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=Path, required=True, help="folder that benchmarks.world.pretrain has written")
    parser.add_argument("--work", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--peer", type=Path, help="diffusers' train_text_to_image_lora_sdxl.py, for the round of that name")


def world_of(given: argparse.Namespace) -> World:
    """The world of the command line, whose models may still have to be written."""
    return World(given.world.resolve(), given.work.resolve(), given.peer and given.peer.resolve())


def train_and_measure(given: argparse.Namespace) -> None:
    """The runs of the rounds, as far as they fit into the time."""
    limits = Limits(given.gpus.split(","), given.jobs, given.measurers, given.seconds)
    world, counts = world_of(given), dict(zip(COUNTS, given.counts, strict=True))
    chosen = [arm for name in given.round for arm in ROUNDS[name] if not given.arms or arm.name in given.arms]
    changes = dict(each.split("=", 1) for each in given.set)

    def runs_for(arms: Iterable[Arm], subjects: int, seeds: int, world: World) -> list[Run]:
        arms = [replace(arm, settings=arm.settings | changes) for arm in arms]
        arms = [replace(arm, images=given.images or arm.images, samples=given.samples or arm.samples) for arm in arms]
        return runs_of(arms, subjects, seeds, world)

    product.prepare_forks()
    if given.gpus and not computes(world.work / "logs", limits):
        limits.forks = False
        print(f"processes import the libraries themselves: forks cannot use the GPUs (see {world.work / 'logs' / 'probe.log'})")
    with shared_gpus(world.work / "mps", limits) if given.mps else nullcontext():
        run_alone(Job("models", "models", dict(os.environ), world.work / "logs" / "models.log", world.write_models), limits)
        first = runs_for([BASE], 1, 1, world)[0]
        if given.gpus:
            warm_up(first, limits)
        if not given.rate:
            rates = [Arm(f"rate {rate:g}", {"LEARNING_RATE": rate}, saves=1) for rate in given.rates]
            run_all(runs_for(rates, RATE_SUBJECTS, 1, world), limits, counts)
        rate = given.rate or rate_of(read_results([first.result.parent]))
        runs = runs_for(chosen, given.subjects, given.seeds, replace(world, rate=rate))
        run_all(runs, limits, counts)
    print(report(read_results([first.result.parent]), BASE.name))


def rate_of(results: Iterable[dict]) -> float:
    """The learning rate of the base recipe in this world: of those that were tried, the smallest whose likeness is nearly that of
    the best. Layers are narrow, so that it is larger than SDXL's."""
    found = defaultdict(list)
    for result in results:
        if result["arm"].startswith("rate "):
            found[float(result["arm"].removeprefix("rate "))].append(result["saves"][-1]["likeness"])
    likeness = {rate: sum(values) / len(values) for rate, values in sorted(found.items())}
    if not likeness:
        sys.exit("no training of any rate was measured")
    rate = next(rate for rate, value in likeness.items() if value >= NEARLY * max(likeness.values()))
    print(f"learning rate of the base recipe: {rate:g} (likeness by rate: {likeness})", flush=True)
    return rate


def warm_up(run: Run, limits: Limits) -> None:
    """A short training alone, which compiles the kernels that the others share."""
    short = replace(run, arm=replace(run.arm, name="warm-up", samples=4 * run.arm.images, saves=1))
    for call in (short.prepare, short.train):
        run_alone(Job(short.name, short.arm.name, short.variables(), short.log, call), limits)
    print(f"{short.log.read_text()}warmed up after {limits.seconds - limits.left:.0f} s", flush=True)


def run_alone(job: Job, limits: Limits) -> None:
    """Run a job on which all others depend; ends the program if it fails."""

    def ended(name: str, code: int, _seconds: float) -> None:
        if code:
            sys.exit(f"{name} ended with exit code {code}:\n{job.log.read_text()[-4000:]}")

    run_jobs([job], limits, ended)


if __name__ == "__main__":
    main()
