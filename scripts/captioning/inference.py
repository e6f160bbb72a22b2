"""Pictures -> probabilities: while the model works on one batch, threads decode and prepare the next ones."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from captioning.tag_choice import TagChoice
from captioning.tagger import Tagger, prepare
from pictures import BrokenPictureError, open_rgb
from prefetch import prefetched

Prepared = np.ndarray | BrokenPictureError


def inferred(paths: Sequence[Path], tagger: Tagger, workers: int) -> Iterator[tuple[Path, np.ndarray | BrokenPictureError]]:
    """Each path with its picture's probabilities, float32 [tags], or with what is wrong with the picture.

    Batches are full but for the last one: broken pictures leave no gaps. `workers` threads stay two batches ahead.
    """
    waiting: list[tuple[Path, np.ndarray]] = []
    for path, prepared in prefetched(lambda path: _prepared(path, tagger.side_px), paths, workers, ahead=2 * tagger.batch_size):
        if isinstance(prepared, BrokenPictureError):
            yield path, prepared
            continue
        waiting.append((path, prepared))
        if len(waiting) == tagger.batch_size:
            yield from _probabilities(waiting, tagger)
            waiting = []
    if waiting:
        yield from _probabilities(waiting, tagger)


def first_batch(paths: Sequence[Path], tagger: Tagger) -> list[np.ndarray]:
    """The first pictures that can be decoded, prepared, at most a batch of them."""
    prepared = [_prepared(path, tagger.side_px)[1] for path in paths[: tagger.batch_size]]
    return [picture for picture in prepared if isinstance(picture, np.ndarray)]


def effect_on_tags(exact: np.ndarray, rounded: np.ndarray, choice: TagChoice) -> str:
    """What rounding does to the tags of a few pictures; both are probabilities [pictures, tags] of the same ones."""
    chosen = [(set(choice.chosen(one)), set(choice.chosen(other))) for one, other in zip(exact, rounded, strict=True)]
    changed = sum(len(one ^ other) for one, other in chosen)
    of_all = sum(len(one) for one, _ in chosen)
    moved = float(np.abs(exact - rounded).max(initial=0.0))
    return (
        f"bfloat16 changes {changed} of {of_all} tags of the first {len(exact)} pictures; probabilities move by at most {moved:.4f}"
    )


def _probabilities(waiting: list[tuple[Path, np.ndarray]], tagger: Tagger) -> Iterator[tuple[Path, np.ndarray]]:
    of_batch = tagger.probabilities([prepared for _, prepared in waiting])
    for (path, _), of_picture in zip(waiting, of_batch, strict=True):
        yield path, of_picture


def _prepared(path: Path, side_px: int) -> tuple[Path, Prepared]:
    try:
        return path, prepare(open_rgb(path), side_px)
    except BrokenPictureError as error:
        return path, error
