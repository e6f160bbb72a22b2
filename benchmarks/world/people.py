"""People as numbers: who a person is, how they are shown, and the tags of both in the vocabulary of WD14 taggers.

An identity is a point in the unit cube of TRAITS, so that distances between people are defined; a shot is everything about an image
that is not the person.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

TRAITS = (
    "face_width", "jaw", "skin", "hair_length", "hair_volume", "fringe", "hair_lightness", "hair_warmth", "eye_size", "eye_gap",
    "eye_hue", "brows", "nose_length", "nose_width", "mouth_width", "freckles", "mole", "glasses", "build",
)  # fmt: skip
"""Each is 0 .. 1. Of freckles, mole and glasses, only values above SHOWN_FROM are visible."""
SHOWN_FROM = 0.6

CLOTHES = ("shirt", "dress", "sweater", "jacket")
COLOURS = {
    "red": (196, 48, 44), "blue": (52, 88, 190), "green": (52, 140, 76), "yellow": (232, 196, 64), "purple": (128, 72, 164),
    "white": (238, 238, 234), "black": (40, 40, 46), "pink": (236, 140, 172),
}  # fmt: skip
EXPRESSIONS = ("smile", "open mouth", "frown", "closed eyes", "expressionless")
POSES = ("arms at sides", "arms up", "hand on own hip", "waving")
BACKGROUNDS = ("white background", "grey background", "field", "beach", "forest", "city", "brick wall", "night sky")
LIGHTS = ("day", "sunset", "night", "backlighting")
FRAMINGS = ("portrait", "upper body", "cowboy shot", "full body")
GAZES = ("looking at viewer", "looking to the side")
EYE_COLOURS = ("brown eyes", "green eyes", "blue eyes")
_OF_OPEN_EYES = {*GAZES, *EYE_COLOURS}
_SMALL = {"freckles", "mole", *_OF_OPEN_EYES}
HIDDEN = {
    "portrait": set(POSES),
    "upper body": set(),
    "cowboy shot": _SMALL,
    "full body": _SMALL | {"glasses", *EXPRESSIONS, "blunt bangs"},
}
"""What cannot be seen in a framing, and is not tagged."""
UNTAGGED = {"day"}
"""What is usual, and has no tag."""


@dataclass(frozen=True)
class Identity:
    """A person."""

    traits: tuple[float, ...]
    """In the order of TRAITS."""

    def __getattr__(self, name: str) -> float:
        if name not in TRAITS:
            raise AttributeError(name)
        return self.traits[TRAITS.index(name)]

    def shows(self, mark: str) -> bool:
        """Whether freckles, mole or glasses are visible."""
        return getattr(self, mark) > SHOWN_FROM

    @property
    def hair_colour(self) -> str:
        """As in tags."""
        if self.hair_lightness < 0.3:
            return "black"
        if self.hair_warmth < 0.25 and self.hair_lightness > 0.6:
            return "grey"
        if self.hair_warmth > 0.75:
            return "red"
        return "brown" if self.hair_lightness < 0.65 else "blonde"

    @property
    def tags(self) -> list[str]:
        """What a tagger says of the person."""
        length = "short" if self.hair_length < 0.33 else "medium" if self.hair_length < 0.66 else "long"
        eyes = "brown" if self.eye_hue < 0.34 else "green" if self.eye_hue < 0.67 else "blue"
        tags = [f"{self.hair_colour} hair", f"{length} hair", f"{eyes} eyes"]
        tags += ["blunt bangs"] if self.fringe > 0.5 else []
        tags += ["dark skin"] if self.skin > 0.65 else []
        return tags + [mark for mark in ("freckles", "mole", "glasses") if self.shows(mark)]


@dataclass(frozen=True)
class Shot:
    """Everything about an image that is not the person."""

    clothes: str
    colour: str
    expression: str
    pose: str
    background: str
    light: str
    framing: str
    gaze: str
    tilt: float = 0.0
    """Of the head, in degrees."""
    seed: int = 0
    """Of what is random in the background."""

    @property
    def tags(self) -> list[str]:
        """What a tagger says of everything but the person."""
        tags = [f"{self.colour} {self.clothes}", self.expression, self.pose, self.background, self.light, self.framing, self.gaze]
        return [tag for tag in tags if tag not in UNTAGGED]


def random_identity(generator: np.random.Generator) -> Identity:
    """Anybody."""
    return Identity(tuple(generator.random(len(TRAITS)).tolist()))


SIMPLE_TRAITS = ("skin", "hair_length", "hair_volume", "fringe", "hair_lightness", "hair_warmth", "glasses")


def simple_identity(generator: np.random.Generator) -> Identity:
    """Anybody of a simple world: people differ in SIMPLE_TRAITS, and all else is average."""
    values = zip(TRAITS, random_identity(generator).traits, strict=True)
    return Identity(tuple(value if trait in SIMPLE_TRAITS else 0.5 for trait, value in values))


def random_shot(generator: np.random.Generator, **fixed: str | float) -> Shot:
    """Any shot, with what is `fixed`; half of all in daylight and half looking at the viewer."""
    drawn = {
        "clothes": generator.choice(CLOTHES),
        "colour": generator.choice(list(COLOURS)),
        "expression": generator.choice(EXPRESSIONS),
        "pose": generator.choice(POSES),
        "background": generator.choice(BACKGROUNDS),
        "light": generator.choice(LIGHTS, p=(0.55, 0.15, 0.15, 0.15)),
        "framing": generator.choice(FRAMINGS, p=(0.35, 0.35, 0.15, 0.15)),
        "gaze": generator.choice(GAZES, p=(0.7, 0.3)),
    }
    values = {name: str(value) for name, value in drawn.items()}
    return Shot(**values | {"tilt": float(generator.uniform(-12, 12)), "seed": int(generator.integers(2**31))} | fixed)


SIMPLE = {
    "clothes": ("shirt",),
    "colour": ("red", "blue", "yellow"),
    "expression": ("smile", "open mouth"),
    "pose": ("arms at sides",),
    "background": ("white background", "grey background", "beach"),
    "light": ("day",),
    "framing": ("portrait",),
    "gaze": ("looking at viewer",),
}
"""What a model can learn in minutes on a CPU."""


def simple_shot(generator: np.random.Generator, **fixed: str | float) -> Shot:
    """A shot in which only what SIMPLE allows differs, the head upright."""
    drawn = {name: str(generator.choice(values)) for name, values in SIMPLE.items()}
    return random_shot(generator, **drawn | {"tilt": 0.0} | fixed)


def tags(identity: Identity, shot: Shot) -> list[str]:
    """What a tagger would say of an image: everything that can be seen at 128 px."""
    hidden = HIDDEN[shot.framing] | (_OF_OPEN_EYES if shot.expression == "closed eyes" else set())
    return ["1girl", "solo", *(tag for tag in [*identity.tags, *shot.tags] if tag not in hidden)]


HAIR_COLOURS = ("black hair", "grey hair", "red hair", "brown hair", "blonde hair")
HAIR_LENGTHS = ("short hair", "medium hair", "long hair")
MARKS = ("freckles", "mole", "glasses")
GROUPS = {
    "hair colour": HAIR_COLOURS,
    "hair length": HAIR_LENGTHS,
    "eye colour": EYE_COLOURS,
    "clothes": tuple(f"{colour} {clothes}" for colour in COLOURS for clothes in CLOTHES),
    "expression": EXPRESSIONS,
    "pose": POSES,
    "background": BACKGROUNDS,
    "light": tuple(light for light in LIGHTS if light not in UNTAGGED),
    "framing": FRAMINGS,
    "gaze": GAZES,
    **{name: (name,) for name in ("blunt bangs", "dark skin", *MARKS)},
}
"""The attributes of an image: tags that exclude each other. A group that is absent from the tags of an image cannot be seen there;
but the absence of a light is the day, and of a tag that is alone in its group that the person has not got it."""
ALL_TAGS = ("1girl", "solo", *(tag for group in GROUPS.values() for tag in group))
"""Every tag that occurs."""


def identity_vector(identity: Identity) -> np.ndarray:
    """The person as numbers with mean 0 and variance 1 over random people, as TRAITS; a mark is either there or not."""
    values = np.array(identity.traits, np.float32)
    marks = np.isin(TRAITS, MARKS)
    shown = values > SHOWN_FROM
    spread = np.sqrt(SHOWN_FROM * (1 - SHOWN_FROM))
    return np.where(marks, (shown - (1 - SHOWN_FROM)) / spread, (values - 0.5) * np.sqrt(12)).astype(np.float32)


_UNSEEN_TRAITS = {
    "portrait": {"build"},
    "upper body": set(),
    "cowboy shot": {"freckles", "mole", "eye_hue", "nose_length", "nose_width", "mouth_width", "brows", "eye_size"},
    "full body": set(TRAITS) - {"face_width", "skin", "hair_length", "hair_volume", "hair_lightness", "hair_warmth", "build"},
}


def visible_traits(found: Iterable[str]) -> np.ndarray:
    """Which of TRAITS can be seen in an image with these tags, a framing among them: booleans. Without a framing, all."""
    found = set(found)
    unseen = set().union(*(_UNSEEN_TRAITS[framing] for framing in FRAMINGS if framing in found))
    if "closed eyes" in found:
        unseen |= {"eye_size", "eye_hue"}
    return ~np.isin(TRAITS, list(unseen))
