"""`python -m benchmarks.world.learn`: trains LoRAs of people whom the base model has never seen, and measures what they learn.

`runs` trains and measures many on all GPUs, continues what an earlier call has begun, and ends within its time; `report` makes
tables of results; `demo` runs the whole pipeline once, as a user does. The base model and the reader are those of
`python -m benchmarks.world.pretrain`.
"""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from benchmarks.world import product
from benchmarks.world.demonstration import ARM, demonstrate
from benchmarks.world.measures import COUNTS
from benchmarks.world.report import read_results, report
from benchmarks.world.runs import BASE, ROUNDS, Run, World, runs_of
from benchmarks.world.scheduler import Limits, run_all, run_jobs, shared_gpus


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world.learn", description=__doc__)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("runs", help="train and measure")
    runs.set_defaults(call=train_and_measure)
    _add_world(runs)
    runs.add_argument("--round", nargs="+", choices=ROUNDS, default=["first"])
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
    runs.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of every training")
    runs.add_argument("--images", type=int, help="of each data set, for a trial")
    runs.add_argument("--samples", type=int, help="training samples of each run, for a trial")
    runs.add_argument("--counts", type=int, nargs=3, default=list(COUNTS.values()), help=f"samples: {', '.join(COUNTS)}")
    once = commands.add_parser("demo", help="run.sh --caption --train for one person, and what its samples show")
    once.set_defaults(call=lambda given: sys.exit(demonstrate(Run(ARM, given.subject, 0, world_of(given)), given.sheet)))
    _add_world(once)
    once.add_argument("--subject", type=int, default=0)
    once.add_argument("--sheet", type=Path, help="image file to write, with samples of every LoRA")
    tables = commands.add_parser("report", help="print tables of results")
    tables.set_defaults(call=lambda given: print(report(read_results(given.folders), given.base)))
    tables.add_argument("folders", type=Path, nargs="+")
    tables.add_argument("--base", default=BASE.name, help="the recipe that the others are compared with")
    given = parser.parse_args()
    given.call(given)


def _add_world(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=Path, required=True, help="folder that benchmarks.world.pretrain has written")
    parser.add_argument("--work", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--peer", type=Path, help="diffusers' train_text_to_image_lora_sdxl.py, for the round of that name")


def world_of(given: argparse.Namespace) -> World:
    """The world of the command line, whose models may still have to be written."""
    return World(given.world.resolve(), given.work.resolve(), given.peer and given.peer.resolve())


def train_and_measure(given: argparse.Namespace) -> None:
    """The runs of the rounds, as far as they fit into the time."""
    changes = dict(each.split("=", 1) for each in given.set)
    arms = {arm.name: arm for name in given.round for arm in ROUNDS[name] if not given.arms or arm.name in given.arms}
    arms = [replace(arm, settings=arm.settings | changes) for arm in arms.values()]
    arms = [replace(arm, images=given.images or arm.images, samples=given.samples or arm.samples) for arm in arms]
    limits = Limits(given.gpus.split(","), given.jobs, given.measurers, given.seconds)
    world = world_of(given)
    runs = list(runs_of(arms, range(given.subjects), range(given.seeds), world))
    product.prepare_forks()
    with shared_gpus(world.work / "mps") if given.mps else nullcontext():
        run_alone("models", dict(os.environ), world.work / "logs" / "models.log", world.write_models, limits)
        if given.gpus and not runs[0].result.exists():
            warm_up(runs[0], limits)
        run_all(runs, limits, dict(zip(COUNTS, given.counts, strict=True)))
    results = read_results([runs[0].result.parent])
    if results:
        print(report(results, BASE.name))


def warm_up(run: Run, limits: Limits) -> None:
    """A short training alone, which compiles the kernels that the others share."""
    short = replace(run, arm=replace(run.arm, name="warm-up", samples=4 * run.arm.images, saves=1))
    for call in (short.prepare, short.train):
        run_alone(short.name, short.variables(), short.log, call, limits)
    print(f"{short.log.read_text()}warmed up after {limits.seconds - limits.left:.0f} s", flush=True)


def run_alone(name: str, variables: dict[str, str], log: Path, call: Callable[[], int], limits: Limits) -> None:
    """Run a job on which all others depend; ends the program if it fails."""

    def ended(name: str, code: int, _seconds: float) -> None:
        if code:
            sys.exit(f"{name} ended with exit code {code}:\n{log.read_text()[-4000:]}")

    run_jobs([(name, variables, log, call)], limits, ended)


if __name__ == "__main__":
    main()
