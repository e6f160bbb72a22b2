"""Which of the saved LoRAs to use, and at which strength. Pure.

A LoRA that looks like the subject often also changes images that do not show it. So the likeness of its samples decides first,
as far as it can be told from chance; then how little it changes what the base model does without the trigger word.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    scores: tuple[float, ...] = ()
    """Likeness of its samples with the trigger word; those of which it cannot be told are left out."""
    distance: float | None = None
    """Of its samples without the trigger word from the base model's; None if there are none."""
    validation_loss: float | None = None
    """Smoothed; None if it was not measured."""


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


def mean_likeness(scores: Sequence[float]) -> float | None:
    """None if there are none."""
    return statistics.mean(scores) if scores else None


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean of at least two scores."""
    return statistics.stdev(scores) / math.sqrt(len(scores))


def choose(saves: Sequence[Save], no_likeness: str = "") -> tuple[Save, str]:
    """The save to use, and why. `saves` are in the order of their epochs, the last one at the end.

    Candidates are the saves whose mean likeness is within one standard error of the best; the one with the smallest distance is
    chosen, of several the earliest. If no save has MIN_SCORED scores, the lowest validation loss decides, and without that the
    last one is chosen. `no_likeness` says why there are no scores, if there is one reason for all.
    """
    compared = [save for save in saves if len(save.scores) >= MIN_SCORED]
    if compared:
        return _by_likeness(compared)
    scored = max(len(save.scores) for save in saves)
    why = no_likeness or f"no LoRA has {MIN_SCORED} samples whose likeness can be told (at most {scored})"
    measured = [save for save in saves if save.validation_loss is not None]
    if measured:
        chosen = min(measured, key=lambda save: save.validation_loss)
        return (
            chosen,
            f"It has the lowest validation loss: {chosen.validation_loss:.4f} (smoothed). Likeness was not compared: {why}.",
        )
    only = "the only one" if len(saves) == 1 else "the last one"
    return saves[-1], f"It is {only}; nothing could be compared: there is no validation loss, and no likeness ({why})."


def _by_likeness(compared: Sequence[Save]) -> tuple[Save, str]:
    means = [statistics.mean(save.scores) for save in compared]
    best = max(range(len(compared)), key=means.__getitem__)  # the earliest of several
    error = standard_error(compared[best].scores)
    candidates = [index for index, mean in enumerate(means) if mean >= means[best] - error - _ROUNDING]
    distances = {index: math.inf if compared[index].distance is None else compared[index].distance for index in candidates}
    chosen = min(candidates, key=distances.get)
    save, likeness = compared[chosen], f"{means[chosen]:.3f} ({len(compared[chosen].scores)} samples)"
    within = f"within one standard error ({error:.3f})"
    if len(compared) == 1:
        return save, f"It is the only one whose likeness could be measured: {likeness}."
    if len(candidates) == 1:
        return save, f"Its likeness, {likeness}, is the best; no other is {within}."
    why = "it is the earliest of these"
    if save.distance is not None:
        why = f"it changes images without the trigger word least ({save.distance:.3f})"
    if chosen == best:
        return save, f"Its likeness, {likeness}, is the best, and of the {len(candidates)} {within} of it, {why}."
    return save, f"Its likeness, {likeness}, is {within} of the best, {means[best]:.3f}, and {why}."


def lowest_strength(scores: Mapping[float, Sequence[float]]) -> tuple[float, str]:
    """The lowest strength whose mean likeness is at most one standard error below that of strength 1, and a sentence about it.

    `scores` of the samples with the trigger word by strength. Strengths with fewer than MIN_SCORED are not compared; the sentence
    is empty if that is so of strength 1.
    """
    whole = scores.get(1.0, ())
    if len(whole) < MIN_SCORED:
        return 1.0, ""
    mean, error = statistics.mean(whole), standard_error(whole)
    means = {strength: statistics.mean(values) for strength, values in scores.items() if len(values) >= MIN_SCORED}
    lowest = min(strength for strength, value in means.items() if value >= mean - error - _ROUNDING)
    if lowest == 1.0:
        return lowest, f"Likeness is lower at smaller strengths, by more than one standard error ({error:.3f})."
    within = f"within one standard error ({error:.3f}) of that at 1, {mean:.3f}"
    return lowest, f"{lowest:g} is the lowest strength whose likeness, {means[lowest]:.3f}, is {within}."
