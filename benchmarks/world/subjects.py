"""The people of whom LoRAs are trained, their data sets, and the prompts that ask for them.

Each has habits: an outfit and a background that are in much of the data set, as in an album. Some clothes, colours, expressions,
poses and backgrounds are never in it, and prompts ask for those.
"""

import string
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.world.drawing import draw
from benchmarks.world.people import (
    BACKGROUNDS,
    CLOTHES,
    COLOURS,
    EXPRESSIONS,
    POSES,
    SIMPLE,
    Identity,
    Shot,
    random_identity,
    random_shot,
    simple_identity,
    simple_shot,
    tags,
)
from common.dataset_layout import DatasetFolder
from common.files import append_json_line, sha256_of

FILE_PX = 256
"""Side of the images of a data set, the smallest that training takes; it makes 128 px of them."""
HABIT = 0.4
"""Share of the images with the usual outfit, and, drawn again, of those with the usual background."""
CLASS_WORD = "1girl"
OPEN_EYED = [expression for expression in EXPRESSIONS if expression != "closed eyes"]
UNSEEN = {
    "clothes": (CLOTHES, 1),
    "colour": (COLOURS, 3),
    "expression": (OPEN_EYED, 1),
    "pose": (POSES, 1),
    "background": (BACKGROUNDS, 3),
}
"""Part of a shot -> its values, and how many of them the data set never has."""
SIMPLE_UNSEEN = {part: (SIMPLE[part], 1) for part in UNSEEN}
"""The same in a world of simple shots; what is always the same there is in the data set, too."""
_SUBJECT, _DATA_SET, _SCENES = 31, 32, 33
"""Of the seeds; those of the pre-training are others."""


@dataclass(frozen=True)
class Subject:
    """A person whom the base model has never seen."""

    number: int
    identity: Identity
    trigger: str
    outfit: tuple[str, str]
    """Colour and clothes of the habit."""
    background: str
    seen: dict[str, list[str]]
    unseen: dict[str, list[str]]
    is_simple: bool = False
    """They live in a world of simple shots."""

    def shots(self, count: int) -> Iterator[Shot]:
        """Those of the data set; a smaller one is the beginning of a larger one."""
        generator = np.random.default_rng((_DATA_SET, self.number))
        for _ in range(count):
            fixed = {part: str(generator.choice(values)) for part, values in self.seen.items()}
            by_outfit, by_background = generator.random(2) < HABIT
            fixed |= dict(zip(("colour", "clothes"), self.outfit, strict=True)) if by_outfit else {}
            fixed |= {"background": self.background} if by_background else {}
            yield self._shot(generator, **fixed)

    def scenes(self, count: int) -> Iterator[Shot]:
        """Shots of what the data set never has, near enough to see the person."""
        generator = np.random.default_rng((_SCENES, self.number))
        for number in range(count):
            fixed = {part: str(generator.choice(values)) for part, values in self.unseen.items()}
            framing = "portrait" if self.is_simple else ("portrait", "upper body")[number % 2]
            yield self._shot(generator, **fixed, framing=framing)

    def _shot(self, generator: np.random.Generator, **fixed: str) -> Shot:
        return simple_shot(generator, **fixed) if self.is_simple else random_shot(generator, **fixed)

    def write_images(self, dataset: DatasetFolder, count: int) -> None:
        """Draw the data set; its manifest says what each image was made to show, as the collect stage's does."""
        dataset.images.mkdir(parents=True, exist_ok=True)
        for number, shot in enumerate(self.shots(count)):
            path = dataset.images / f"{number:03d}.png"
            if not path.exists():
                draw(self.identity, shot, FILE_PX).save(path)
                line = {"file": f"{dataset.images.name}/{path.name}", "sha256": sha256_of(path), "texts": [self.prompt(shot)]}
                append_json_line(dataset.manifest, line)

    def prompt(self, shot: Shot) -> str:
        """Asks for a shot of anybody."""
        return ", ".join(tag for tag in tags(self.identity, shot) if tag not in self.identity.tags)


def subject(number: int, is_simple: bool = False) -> Subject:
    """The same each time."""
    generator = np.random.default_rng((_SUBJECT, number))
    identity = simple_identity(generator) if is_simple else random_identity(generator)
    trigger = "".join(generator.choice(list(string.ascii_lowercase), 5))
    seen, unseen = {}, {}
    for part, (values, count) in (SIMPLE_UNSEEN if is_simple else UNSEEN).items():
        shuffled = generator.permutation(list(values)).tolist()
        unseen[part], seen[part] = shuffled[:count], shuffled[count:] or shuffled
    outfit = str(generator.choice(seen["colour"])), str(generator.choice(seen["clothes"]))
    return Subject(number, identity, trigger, outfit, str(generator.choice(seen["background"])), seen, unseen, is_simple)
