"""Results of many runs as tables: the mean of each recipe, and how far it is from the base recipe.

Intervals are those of a paired bootstrap whose unit is the identity: the difference is taken for each person first, over the seeds
that both recipes have, and people are drawn with replacement.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.world.recipes import ROUNDS
from common.files import parse_json, read_file

MEASURES = ("likeness", "likeness_alone", "likeness_scene", "fidelity", "leakage", "drift", "diversity")
DRAWS, INTERVAL = 10_000, (2.5, 97.5)
SLOWER = 0.7
"""A recipe in whose time less than this share of it could be trained is compared at equal time, too; times of others are alike."""
WITHIN = 1
"""Saves that a pick may be away from the best one."""


def read_results(folders: Iterable[Path]) -> list[dict]:
    """Every result in the folders, each run once."""
    files = {path.name: path for folder in folders for path in sorted(folder.glob("*.json"))}
    return [parse_json(read_file(files[name])) for name in sorted(files)]


def report(results: Sequence[dict], base: str) -> str:
    """Everything as Markdown."""
    parts = ["## Recipes", comparison(results, base), "## At equal likeness", at_equal_likeness(results, base)]
    parts += ["## Over the run", curves(results)]
    if any("picks" in result for result in results):
        parts += ["## What is picked", picks(results)]
    return "\n\n".join(parts) + "\n"


def comparison(results: Sequence[dict], base: str) -> str:
    """A row for each recipe at the end of its run: the base recipe's values, and the others' differences from it."""
    by_arm = _by_arm(results)
    lines = ["| | runs | " + " | ".join(MEASURES) + " | s |", "|---" * (len(MEASURES) + 3) + "|"]
    for arm in sorted(by_arm, key=lambda arm: arm != base):
        lines.append(_row(arm, by_arm, base, -1))
        share = _seconds(by_arm.get(base, by_arm[arm])) / _seconds(by_arm[arm])
        in_time = math.floor(share * len(next(iter(by_arm[arm].values()))["saves"]))
        if share < SLOWER and in_time:
            lines.append(_row(arm, by_arm, base, in_time - 1))
    return "\n".join(lines)


def _row(arm: str, by_arm: Mapping[str, Mapping[tuple[int, int], dict]], base: str, number: int) -> str:
    """The row of a recipe at its save `number`; -1: at the end."""
    runs, compared = by_arm[arm], arm != base and base in by_arm
    cells = []
    for name in MEASURES:
        mean = f"{np.mean([run['saves'][number][name] for run in runs.values()]):.3f}"
        cells.append(f"{mean} {_difference(by_arm[base], runs, name, number)}".strip() if compared else mean)
    label = (
        arm if number == -1 else f"{arm}, after {next(iter(runs.values()))['saves'][number]['samples']} samples, as long as {base}"
    )
    return f"| {label} | {len(runs)} | " + " | ".join(cells) + f" | {_seconds(runs):.0f} |"


def _difference(base: Mapping[tuple[int, int], dict], other: Mapping[tuple[int, int], dict], name: str, number: int) -> str:
    """The difference of `other` from `base`, as `_shown`."""
    both = base.keys() & other.keys()
    return _shown({key: other[key]["saves"][number][name] - base[key]["saves"][-1][name] for key in both})


def _shown(differences: Mapping[tuple[int, int], float]) -> str:
    """Differences of runs, by (subject, seed), with the interval, bold where 0 is outside; empty for less than two people."""
    of_people = defaultdict(list)
    for (person, _), difference in sorted(differences.items()):
        of_people[person].append(difference)
    if len(of_people) < 2:
        return ""
    middle, low, high = interval([float(np.mean(each)) for each in of_people.values()])
    shown = f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"(**{shown}**)" if low > 0 or high < 0 else f"({shown})"


def at_equal_likeness(results: Sequence[dict], base: str) -> str:
    """What a recipe pays for likeness: where two runs of a person and seed have the same likeness, the highest that both have at
    their end, the training samples that each took, and the differences of what is measured besides."""
    by_arm = _by_arm(results)
    of_base = by_arm.get(base, {})
    measures = [name for name in MEASURES if not name.startswith("likeness")]
    lines = ["| | runs | likeness | samples | samples, base | " + " | ".join(measures) + " |", "|---" * (len(measures) + 5) + "|"]
    for arm, runs in by_arm.items():
        pairs = {key: _as_alike(of_base[key], runs[key]) for key in runs.keys() & of_base.keys()}
        pairs = {key: pair for key, pair in pairs.items() if pair[0]["likeness"] > 0}
        if arm == base or not pairs:
            continue
        means = [
            np.mean([pair[number][name] for pair in pairs.values()])
            for number, name in ((1, "likeness"), (1, "samples"), (0, "samples"))
        ]
        cells = [f"{means[0]:.3f}", f"{means[1]:.0f}", f"{means[2]:.0f}"]
        for name in measures:
            mean = np.mean([pair[1][name] for pair in pairs.values()])
            cells.append(f"{mean:.3f} {_shown({key: pair[1][name] - pair[0][name] for key, pair in pairs.items()})}".strip())
        lines.append(f"| {arm} | {len(pairs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _as_alike(*runs: dict) -> list[dict[str, float]]:
    """Measures of each run, between two of its saves, where it is first as alike as all of them are at the end."""
    level = min(run["saves"][-1]["likeness"] for run in runs)
    return [_where_alike(run, level) for run in runs]


def _where_alike(run: dict, level: float) -> dict[str, float]:
    before = {"samples": 0, "fidelity": run["base"]["fidelity"], "diversity": 1.0}  # the base model
    for save in run["saves"]:
        if save["likeness"] >= level:
            share = (level - before.get("likeness", 0)) / (save["likeness"] - before.get("likeness", 0) or 1)
            return {name: before.get(name, 0) + share * (value - before.get(name, 0)) for name, value in save.items()}
        before = save
    raise AssertionError(f"{level} is not the likeness of any save of {run['arm']}")


def _seconds(runs: Mapping[tuple[int, int], dict]) -> float:
    """The mean time of a training."""
    return float(np.mean([run["seconds"] for run in runs.values()]))


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """The mean of the differences of people, and the ends of its bootstrap interval."""
    values = np.asarray(differences)
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.percentile(values[drawn].mean(1), INTERVAL)
    return float(values.mean()), float(low), float(high)


def curves(results: Sequence[dict]) -> str:
    """A row for each save of each recipe."""
    lines = ["| | samples | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 2) + "|"]
    for arm, runs in _by_arm(results).items():
        for number, save in enumerate(next(iter(runs.values()))["saves"]):
            several = [run["saves"][number] for run in runs.values() if number < len(run["saves"])]
            values = [np.mean([each[name] for each in several]) for name in MEASURES]
            lines.append(f"| {arm} | {save['samples']} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines)


def quality(save: Mapping[str, float]) -> float:
    """What the best save has most of: the mean of likeness, which counts up to 1, and fidelity."""
    return (min(save["likeness"], 1.0) + save["fidelity"]) / 2


def picks(results: Sequence[dict]) -> str:
    """How often each rule picks a save within WITHIN of the best one, and what its pick lacks in quality."""
    found = defaultdict(list)
    for result in (result for result in results if "picks" in result):
        saves = result["saves"]
        epochs = [save["epochs"] for save in saves]
        best = max(range(len(saves)), key=lambda number: quality(saves[number]))
        for rule, picked in (result["picks"] | {"last": epochs[-1]}).items():
            number = min(range(len(epochs)), key=lambda index: abs(epochs[index] - picked))
            found[rule].append((abs(number - best), number, quality(saves[best]) - quality(saves[number])))
    lines = ["| rule | runs | within one save of the best | saves away, mean | less quality, mean | most |", "|---" * 6 + "|"]
    for rule, each in found.items():
        away, _, less = (np.array(column) for column in zip(*each, strict=True))
        near = f"{(away <= WITHIN).sum()} of {len(each)}"
        lines.append(f"| {rule} | {len(each)} | {near} | {away.mean():.1f} | {less.mean():.3f} | {less.max():.3f} |")
    return "\n".join(lines)


def _by_arm(results: Iterable[dict]) -> dict[str, dict[tuple[int, int], dict]]:
    """Recipe -> (subject, seed) -> result."""
    found: dict[str, dict[tuple[int, int], dict]] = defaultdict(dict)
    for result in results:
        found[result["arm"]][result["subject"], result["seed"]] = result
    order = [arm.name for arms in ROUNDS.values() for arm in arms]
    return {arm: found[arm] for arm in sorted(found, key=lambda arm: order.index(arm) if arm in order else len(order))}
