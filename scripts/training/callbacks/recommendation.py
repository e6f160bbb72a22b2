"""Which of the saved LoRAs to use, and at which strength. Pure.

What the rules are worth was measured where the truth is known (docs/results.md, "Does it learn?"): the lowest validation loss comes
long before the best likeness, and a loss that has doubled shows that the model is breaking down.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.loop import BROKEN

MIN_SCORED = 4
"""A likeness of fewer samples is not compared."""
STRENGTHS = (0.6, 0.8, 1.0)
"""At which the recommended LoRA is sampled, the lowest first."""
_ROUNDING = 1e-9
"""Two numbers that differ by less are equal."""


@dataclass(frozen=True)
class Save:
    """A LoRA that was saved, and what was measured of it."""

    file: str
    epochs: int
    scores: tuple[float | None, ...] = ()
    """Likeness of its samples with the trigger word, of the same prompts and seeds for every LoRA; None where it cannot be told."""
    distance: float | None = None
    """Of its samples without the trigger word from the base model's; None if there are none."""


@dataclass(frozen=True)
class Recommendation:
    """The LoRA to use."""

    file: str
    epochs: int
    strength: float
    reason: str
    """In one line."""

    @property
    def metadata(self) -> dict[str, str]:
        """What the header of the recommended file says in addition to that of the file it is a copy of."""
        return {
            "loracat_recommended_file": self.file,
            "loracat_recommended_strength": f"{self.strength:g}",
            "loracat_recommended_reason": self.reason,
        }


def mean_likeness(scores: Sequence[float | None]) -> float | None:
    """Of the samples whose likeness can be told; None if there are none."""
    known = known_scores(scores)
    return statistics.mean(known) if known else None


def known_scores(scores: Sequence[float | None]) -> list[float]:
    """The scores of samples whose likeness can be told."""
    return [score for score in scores if score is not None]


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean of at least two scores."""
    return statistics.stdev(scores) / math.sqrt(len(scores))


def choose(saves: Sequence[Save], no_likeness: str = "", losses: Mapping[int, float] | None = None) -> tuple[Save, str]:
    """The save to use, and why. `saves` are in the order of their epochs, the last one at the end.

    Saves that are BROKEN are left out. Of the others, the one with the best mean likeness is found; before it, those without a gap
    whose samples are on average within one standard error of its samples, prompt by prompt, are as good, and the earliest of them
    is chosen. If no save has MIN_SCORED scores, the last one is chosen. `no_likeness` says why there are no scores, if there is
    one reason for all. `losses` are the smoothed validation losses by epochs, of which saves may have none.
    """
    losses = losses or {}
    unbroken, left_out = _unbroken(saves, losses), ""
    if not unbroken:
        least = min((save for save in saves if save.epochs in losses), key=lambda save: losses[save.epochs])
        return least, "All were saved after the model had broken down; it has the lowest validation loss of them."
    if len(unbroken) < len(saves):
        first = saves[len(unbroken)].file
        left_out = f" {first} and later ones are left out: the validation loss was more than {BROKEN:g} times the lowest."
    compared = [save for save in unbroken if len(known_scores(save.scores)) >= MIN_SCORED]
    if compared:
        save, reason = _by_likeness(compared)
        if save.distance is not None:
            reason += f" Images without the trigger word are {save.distance:.3f} from the base model's."
        return save, reason + left_out
    scored = max(len(known_scores(save.scores)) for save in unbroken)
    why = no_likeness or f"no LoRA has {MIN_SCORED} samples whose likeness can be told (at most {scored})"
    only = "the last one before the model broke down" if left_out else "the only one" if len(saves) == 1 else "the last one"
    return unbroken[-1], f"It is {only}; likeness was not compared: {why}.{left_out}"


def _unbroken(saves: Sequence[Save], losses: Mapping[int, float]) -> Sequence[Save]:
    """The saves before the first one, after the lowest of the losses, whose loss is more than BROKEN times as high."""
    lowest = min(losses, key=losses.get, default=0)
    for index, save in enumerate(saves):
        if save.epochs > lowest and save.epochs in losses and losses[save.epochs] > BROKEN * losses[lowest]:
            return saves[:index]
    return saves


def _by_likeness(compared: Sequence[Save]) -> tuple[Save, str]:
    means = [mean_likeness(save.scores) for save in compared]
    best = max(range(len(compared)), key=means.__getitem__)  # the earliest of several
    chosen = best
    while chosen and _is_as_good(compared[chosen - 1].scores, compared[best].scores):
        chosen -= 1
    save, likeness = compared[chosen], f"{means[chosen]:.3f} ({len(known_scores(compared[chosen].scores))} samples)"
    if len(compared) == 1:
        return save, f"It is the only one whose likeness could be measured: {likeness}."
    if chosen == best:
        return save, f"Its likeness, {likeness}, is the best."
    best_one = f"the best, {means[best]:.3f} ({compared[best].file})"
    between = ", and so are those between them" if best - chosen > 1 else ""
    return save, f"Its likeness, {likeness}, is within one standard error of {best_one}{between}."


def _is_as_good(scores: Sequence[float | None], best: Sequence[float | None]) -> bool:
    """Whether `scores` are on average at most one standard error below those of `best`, prompt by prompt."""
    lacking = _lacking(scores, best)
    return len(lacking) >= MIN_SCORED and statistics.mean(lacking) <= standard_error(lacking) + _ROUNDING


def _lacking(scores: Sequence[float | None], best: Sequence[float | None]) -> list[float]:
    """By how much each of `scores` is below that of `best` for the same prompt, where both can be told."""
    pairs = zip(scores, best, strict=True)
    return [other - score for score, other in pairs if score is not None and other is not None]


def lowest_strength(scores: Mapping[float, Sequence[float | None]]) -> tuple[float, str]:
    """The lowest strength whose samples are on average within one standard error of those of strength 1, prompt by prompt, and a
    sentence about it.

    `scores` of the samples with the trigger word by strength. Strengths with fewer than MIN_SCORED in common with strength 1 are
    not compared; the sentence is empty if that is so of all of them.
    """
    full = scores.get(1.0, ())
    lower = [
        strength for strength in sorted(scores) if strength < 1 and full and len(_lacking(scores[strength], full)) >= MIN_SCORED
    ]
    if not lower:
        return 1.0, ""
    for strength in lower:
        if _is_as_good(scores[strength], full):
            likeness, at_full = mean_likeness(scores[strength]), mean_likeness(full)
            within = f"within one standard error of that at 1, {at_full:.3f}"
            return strength, f"{strength:g} is the lowest strength whose likeness, {likeness:.3f}, is {within}."
    compared = " and ".join(f"{strength:g}" for strength in lower)
    return 1.0, f"At strength {compared}, likeness is lower than at 1 by more than one standard error."
