"""People as numbers: who somebody is, how they are shown, and the tags of both in the vocabulary of WD14 taggers.

An identity is a point in the unit cube of TRAITS, so that distances between people are defined; a shot is everything about an image
that is not the person.
"""

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
_OF_OPEN_EYES = {*GAZES, "brown eyes", "green eyes", "blue eyes"}
_SMALL = {"freckles", "mole", *_OF_OPEN_EYES}
HIDDEN = {
    "portrait": {pose for pose in POSES if pose != "arms up"},
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


def random_shot(generator: np.random.Generator, **fixed: str) -> Shot:
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
    values = {name: str(value) for name, value in drawn.items()} | fixed
    return Shot(**values, tilt=float(generator.uniform(-12, 12)), seed=int(generator.integers(2**31)))


def tags(identity: Identity, shot: Shot) -> list[str]:
    """What a tagger would say of an image: everything that can be seen at 128 px."""
    hidden = HIDDEN[shot.framing] | (
        {*GAZES, "brown eyes", "green eyes", "blue eyes"} if shot.expression == "closed eyes" else set()
    )
    return ["1girl", "solo", *(tag for tag in [*identity.tags, *shot.tags] if tag not in hidden)]


ALL_TAGS = tuple(
    dict.fromkeys(
        ["1girl", "solo"]
        + [f"{colour} hair" for colour in ("black", "grey", "red", "brown", "blonde")]
        + [f"{length} hair" for length in ("short", "medium", "long")]
        + [f"{colour} eyes" for colour in ("brown", "green", "blue")]
        + ["blunt bangs", "dark skin", "freckles", "mole", "glasses"]
        + [f"{colour} {clothes}" for colour in COLOURS for clothes in CLOTHES]
        + [each for group in (EXPRESSIONS, POSES, BACKGROUNDS, LIGHTS, FRAMINGS, GAZES) for each in group if each not in UNTAGGED]
    )
)
"""Every tag that occurs."""
