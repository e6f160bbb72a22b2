"""Draws a person in a shot, antialiased.

The figure is described in heads: the head's centre is the origin, its height is 1, and y grows downwards.
"""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi, radians, sin

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from benchmarks.world.people import COLOURS, Identity, Shot

OVERSAMPLING = 4
Colour = tuple[int, int, int]
Point = tuple[float, float]
HEADS = {"portrait": (0.60, 0.47), "upper body": (0.34, 0.33), "cowboy shot": (0.205, 0.2), "full body": (0.125, 0.14)}
"""Height of the head, and the place of its centre from above, as shares of the image."""

TINTS = {"sunset": (255, 178, 122), "night": (96, 108, 184), "backlighting": (186, 182, 180)}


@dataclass
class Pen:
    """Draws shapes that are given in heads."""

    draw: ImageDraw.ImageDraw
    unit: float
    """Pixels of a head."""
    origin: Point
    """Pixels of the head's centre."""
    turn: float = 0.0
    """Radians about the origin."""

    def place(self, x: float, y: float) -> Point:
        """Pixels of a point."""
        c, s = cos(self.turn), sin(self.turn)
        return self.origin[0] + self.unit * (c * x - s * y), self.origin[1] + self.unit * (s * x + c * y)

    def shape(self, points: Sequence[Point], colour: Colour) -> None:
        """A filled polygon."""
        self.draw.polygon([self.place(*point) for point in points], fill=colour)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """A filled ellipse, which turns along."""
        self.shape([(x + rx * cos(a), y + ry * sin(a)) for a in np.linspace(0, 2 * pi, 48, endpoint=False)], colour)

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """A line with round ends, `width` heads wide."""
        placed, pixels = [self.place(*point) for point in points], max(1, round(width * self.unit))
        self.draw.line(placed, fill=colour, width=pixels, joint="curve")
        for x, y in (placed[0], placed[-1]):
            r = pixels / 2
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def draw(identity: Identity, shot: Shot, size: int) -> Image.Image:
    """The image, `size` x `size` pixels, RGB. The same arguments give the same pixels."""
    side = size * OVERSAMPLING
    image = Image.new("RGB", (side, side))
    canvas = ImageDraw.Draw(image)
    BACKDROPS[shot.background](canvas, side, np.random.default_rng(shot.seed))
    if tint := TINTS.get(shot.light):  # more on what is behind the person, whose colours must stay recognizable
        image.paste(ImageChops.multiply(image, Image.new("RGB", image.size, tint)))
    head, centre = HEADS[shot.framing]
    unit = head * side
    body = Pen(canvas, unit, (side / 2, centre * side))
    face = Pen(canvas, unit, body.origin, radians(shot.tilt))
    if shot.light == "backlighting":
        _glow(image, face)
    _back_hair(face, identity)
    _body(body, identity, shot)
    _locks(face, identity)
    _head(face, identity, shot)
    image = image.reduce(OVERSAMPLING)
    if tint:
        image = ImageChops.multiply(image, Image.new("RGB", image.size, _between((255, 255, 255), tint, 0.45)))
    return image


def skin_colour(identity: Identity) -> Colour:
    return _between((250, 220, 196), (110, 70, 48), identity.skin)


def hair_colour(identity: Identity) -> Colour:
    """From black over brown to blonde, towards red with its warmth."""
    saturation = 0.12 + 0.62 * identity.hair_warmth
    hue = 0.11 - 0.09 * identity.hair_warmth
    return _hsv(hue, saturation, 0.10 + 0.82 * identity.hair_lightness)


def eye_colour(identity: Identity) -> Colour:
    return _hsv(0.06 + 0.54 * identity.eye_hue, 0.65, 0.42 + 0.3 * identity.eye_hue)


def _half_width(identity: Identity) -> float:
    return 0.33 + 0.09 * identity.face_width


def _face_outline(identity: Identity) -> list[Point]:
    """A superellipse, whose lower half is pointed or square."""
    half, points = _half_width(identity), []
    for angle in np.linspace(0, 2 * pi, 90, endpoint=False):
        x, y = cos(angle), sin(angle)
        exponent = 2.0 if y < 0 else 1.55 + 1.5 * identity.jaw
        length = (abs(x) ** exponent + abs(y) ** exponent) ** (-1 / exponent)
        points.append((half * x * length, 0.5 * y * length))
    return points


def _back_hair(pen: Pen, identity: Identity) -> None:
    colour = _shade(hair_colour(identity), 0.8)
    half, volume = _half_width(identity), 0.05 + 0.14 * identity.hair_volume
    width, length = half + volume, _hair_end(identity)
    pen.oval(0, -0.08, width, 0.52 + volume, colour)
    pen.shape([(-width, -0.1), (width, -0.1), (width * 1.02, length), (0.6 * width, length + 0.08), (-0.6 * width, length + 0.08), (-width * 1.02, length)], colour)  # fmt: skip # noqa: E501


def _hair_end(identity: Identity) -> float:
    """How far down it falls; the tags' lengths differ in every framing."""
    return 0.1 + 1.1 * identity.hair_length


def _locks(pen: Pen, identity: Identity) -> None:
    """Hair in front of the shoulders."""
    half, end = _half_width(identity), _hair_end(identity)
    outer, inner = half + 0.05 + 0.14 * identity.hair_volume, 0.72 * half
    for side in (-1, 1):
        pen.shape([(side * inner, 0), (side * outer, 0), (side * outer * 1.02, end), (side * (inner + outer) / 2, end + 0.06), (side * inner, end)], _shade(hair_colour(identity), 0.88))  # fmt: skip # noqa: E501


def _body(pen: Pen, identity: Identity, shot: Shot) -> None:
    skin, cloth = skin_colour(identity), COLOURS[shot.colour]
    shoulder, dark = 0.62 + 0.36 * identity.build, _shade(cloth, 0.78)
    hip = 0.5 + 0.25 * identity.build
    legs = skin if shot.clothes == "dress" else (58, 66, 92)
    for side in (-1, 1):
        pen.line([(side * 0.24, 3.0), (side * 0.26, 5.9)], 0.34, legs)
        pen.line([(side * 0.26, 5.95), (side * 0.36, 5.98)], 0.2, (60, 48, 44))
    arm = {
        "arms at sides": [(-1, (1.05, 2.0), (1.0, 2.9)), (1, (1.05, 2.0), (1.0, 2.9))],
        "arms up": [(-1, (1.35, 0.55), (1.0, -0.5)), (1, (1.35, 0.55), (1.0, -0.5))],
        "hand on own hip": [(-1, (1.05, 2.0), (1.0, 2.9)), (1, (1.55, 1.75), (0.75, 2.35))],
        "waving": [(-1, (1.05, 2.0), (1.0, 2.9)), (1, (1.5, 1.2), (1.25, 0.1))],
    }[shot.pose]
    for side, elbow, hand in arm:
        start, bend, end = (side * shoulder, 0.98), (side * elbow[0] * (shoulder + 0.2), elbow[1]), (side * hand[0] * (shoulder + 0.1), hand[1])  # fmt: skip # noqa: E501
        pen.line([start, bend, end], 0.3, dark)
        pen.oval(*end, 0.15, 0.17, skin)
    pen.line([(0, 0.3), (0, 0.85)], 0.32, _shade(skin, 0.88))
    torso = [(-shoulder, 1.0), (-0.25, 0.72), (0.25, 0.72), (shoulder, 1.0), (hip, 3.05), (-hip, 3.05)]
    if shot.clothes == "dress":
        torso = [*torso[:4], (hip * 0.8, 2.1), (hip * 1.7, 4.1), (-hip * 1.7, 4.1), (-hip * 0.8, 2.1)]
    pen.shape(torso, cloth)
    if shot.clothes == "shirt":
        pen.shape([(-0.2, 0.7), (0, 1.1), (0.2, 0.7)], skin)
        for y in (1.3, 1.7, 2.1, 2.5):
            pen.oval(0, y, 0.035, 0.035, dark)
    elif shot.clothes == "dress":
        pen.oval(0, 0.74, 0.3, 0.2, skin)
        pen.line([(-hip * 0.8, 2.1), (hip * 0.8, 2.1)], 0.1, dark)
    elif shot.clothes == "sweater":
        pen.line([(-0.17, 0.66), (0.17, 0.66)], 0.3, dark)
        for y in (1.25, 1.6, 1.95, 2.3):
            pen.line([(-0.42, y), (0.42, y)], 0.05, dark)
    else:
        pen.shape([(-0.2, 0.7), (0.2, 0.7), (0.16, 3.05), (-0.16, 3.05)], (232, 230, 224))
        for side in (-1, 1):
            pen.line([(side * 0.22, 0.75), (side * 0.2, 3.0)], 0.09, dark)


def _head(pen: Pen, identity: Identity, shot: Shot) -> None:
    skin, hair = skin_colour(identity), hair_colour(identity)
    half = _half_width(identity)
    for side in (-1, 1):
        pen.oval(side * half, 0.03, 0.06, 0.1, _shade(skin, 0.92))
    pen.shape(_face_outline(identity), skin)
    pen.oval(-half * 0.55, 0.17, 0.085, 0.05, _between(skin, (228, 120, 110), 0.28))
    pen.oval(half * 0.55, 0.17, 0.085, 0.05, _between(skin, (228, 120, 110), 0.28))
    if identity.shows("freckles"):
        for x, y in ((-0.2, 0.13), (-0.14, 0.17), (-0.08, 0.13), (0.08, 0.13), (0.14, 0.17), (0.2, 0.13), (0.0, 0.1)):
            pen.oval(x, y, 0.014, 0.014, _shade(skin, 0.66))
    _nose_and_mouth(pen, identity, shot, skin)
    _eyes(pen, identity, shot, hair)
    if identity.shows("mole"):
        pen.oval(half * 0.55, 0.29, 0.02, 0.02, (70, 42, 34))
    _front_hair(pen, identity, hair, half)


def _nose_and_mouth(pen: Pen, identity: Identity, shot: Shot, skin: Colour) -> None:
    length, width = 0.1 + 0.1 * identity.nose_length, 0.035 + 0.05 * identity.nose_width
    tip, shadow = 0.02 + length, _shade(skin, 0.74)
    pen.line([(-0.01, 0.03), (-width * 0.8, tip), (width * 0.8, tip)], 0.018, shadow)
    wide, lips, y = 0.08 + 0.09 * identity.mouth_width, _between((176, 66, 70), (120, 44, 46), identity.skin), 0.315
    if shot.expression == "open mouth":
        pen.oval(0, y, wide * 0.6, 0.075, (92, 30, 34))
        pen.oval(0, y + 0.04, wide * 0.4, 0.03, (214, 110, 112))
        return
    curve = {"smile": 0.065, "frown": -0.055}.get(shot.expression, 0.0)
    line = [(x * wide, y + curve * (0.5 - x * x)) for x in np.linspace(-1, 1, 15)]
    pen.line(line, 0.026, lips)


def _eyes(pen: Pen, identity: Identity, shot: Shot, hair: Colour) -> None:
    gap, size, y = 0.13 + 0.06 * identity.eye_gap, 0.045 + 0.035 * identity.eye_size, -0.03
    aside = 0.45 * size if shot.gaze == "looking to the side" else 0.0
    brow, lowered = 0.012 + 0.03 * identity.brows, {"frown": 0.04, "open mouth": -0.03}.get(shot.expression, 0.0)
    for side in (-1, 1):
        x = side * gap
        if shot.expression == "closed eyes":
            pen.line([(x + t * size * 1.25, y + 0.03 * (1 - t * t)) for t in np.linspace(-1, 1, 9)], 0.02, (52, 36, 34))
        else:
            pen.oval(x, y, size * 1.3, size, (250, 250, 248))
            pen.oval(x + aside, y, size * 0.78, size * 0.92, eye_colour(identity))
            pen.oval(x + aside, y, size * 0.36, size * 0.42, (20, 18, 20))
            pen.oval(x + aside + size * 0.25, y - size * 0.3, size * 0.16, size * 0.16, (255, 255, 255))
            pen.line([(x + t * size * 1.35, y - size * (1 - 0.5 * t * t)) for t in np.linspace(-1, 1, 9)], 0.016, (46, 32, 30))
        pen.line([(x - side * size, y - size - 0.055 + lowered), (x + side * size * 1.3, y - size - 0.07)], brow, _shade(hair, 0.7))
        if identity.shows("glasses"):
            rim = [(x + 0.118 * cos(a), y + 0.1 * sin(a)) for a in np.linspace(0, 2 * pi, 25)]
            pen.line(rim, 0.02, (36, 34, 40))
    if identity.shows("glasses"):
        pen.line([(-gap + 0.11, y - 0.02), (gap - 0.11, y - 0.02)], 0.02, (36, 34, 40))


def _front_hair(pen: Pen, identity: Identity, hair: Colour, half: float) -> None:
    volume = 0.05 + 0.14 * identity.hair_volume
    width, top = half + volume, -0.5 - volume
    cap = [(width * cos(a), -0.13 + (0.37 + volume) * sin(a)) for a in np.linspace(pi, 2 * pi, 40)]
    hairline = -0.34 + 0.24 * identity.fringe
    lower = [(half * 0.98, -0.05), *((x * half * 0.92, hairline + 0.03 * cos(9 * x) - 0.04 * (1 - x * x)) for x in np.linspace(1, -1, 21)), (-half * 0.98, -0.05)]  # fmt: skip # noqa: E501
    pen.shape([*cap, *lower], hair)
    pen.line([(-0.16, top + 0.13), (0.1, top + 0.1)], 0.03, _between(hair, (255, 255, 255), 0.22))
    sides = min(0.45, 0.9 * identity.hair_length)
    for side in (-1, 1):
        pen.line([(side * (half + volume * 0.4), -0.12), (side * (half + volume * 0.5), sides)], 0.06 + volume * 0.6, hair)


def _glow(image: Image.Image, pen: Pen) -> None:
    """Light behind the head."""
    light = Image.new("L", image.size)
    x, y = pen.place(0, 0)
    r = pen.unit * 1.25
    ImageDraw.Draw(light).ellipse((x - r, y - r, x + r, y + r), fill=220)
    image.paste(Image.new("RGB", image.size, (255, 250, 226)), mask=light.filter(ImageFilter.BoxBlur(r / 3)))


def _plain(colour: Colour) -> Callable:
    return lambda canvas, side, generator: canvas.rectangle((0, 0, side, side), fill=colour)


def _field(canvas: ImageDraw.ImageDraw, side: int, generator: np.random.Generator) -> None:
    canvas.rectangle((0, 0, side, side), fill=(150, 200, 240))
    horizon = side * generator.uniform(0.5, 0.65)
    canvas.rectangle((0, horizon, side, side), fill=(112, 178, 84))
    for _ in range(3):
        x, y, r = generator.uniform(0, side), generator.uniform(0.05, 0.3) * side, generator.uniform(0.06, 0.12) * side
        canvas.ellipse((x - 2 * r, y - r * 0.6, x + 2 * r, y + r * 0.6), fill=(246, 248, 250))


def _beach(canvas: ImageDraw.ImageDraw, side: int, generator: np.random.Generator) -> None:
    canvas.rectangle((0, 0, side, side), fill=(176, 220, 246))
    sea = side * generator.uniform(0.38, 0.5)
    canvas.rectangle((0, sea, side, side), fill=(44, 134, 190))
    canvas.rectangle((0, sea + 0.2 * side, side, side), fill=(236, 214, 160))


def _forest(canvas: ImageDraw.ImageDraw, side: int, generator: np.random.Generator) -> None:
    canvas.rectangle((0, 0, side, side), fill=(66, 112, 70))
    for x in np.linspace(0, side, 8) + generator.uniform(-0.05, 0.05, 8) * side:
        width = generator.uniform(0.025, 0.05) * side
        canvas.rectangle((x - width, 0, x + width, side), fill=(82, 62, 48))
    for _ in range(14):
        x, y, r = generator.uniform(0, side), generator.uniform(0, 0.35) * side, generator.uniform(0.07, 0.14) * side
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=(44, 92, 52))


def _city(canvas: ImageDraw.ImageDraw, side: int, generator: np.random.Generator) -> None:
    canvas.rectangle((0, 0, side, side), fill=(196, 210, 222))
    x = 0.0
    while x < side:
        width, height, grey = (
            generator.uniform(0.14, 0.26) * side,
            generator.uniform(0.45, 0.9) * side,
            int(generator.uniform(104, 150)),
        )
        canvas.rectangle((x, side - height, x + width, side), fill=(grey, grey, grey + 10))
        for wx in np.arange(x + 0.03 * side, x + width - 0.04 * side, 0.06 * side):
            for wy in np.arange(side - height + 0.04 * side, side, 0.09 * side):
                canvas.rectangle((wx, wy, wx + 0.03 * side, wy + 0.05 * side), fill=(232, 226, 178))
        x += width + 0.02 * side


def _brick_wall(canvas: ImageDraw.ImageDraw, side: int, generator: np.random.Generator) -> None:
    canvas.rectangle((0, 0, side, side), fill=(200, 190, 180))
    height, width = side / 12, side / 6
    for row in range(13):
        for column in range(-1, 7):
            x, y = (column + 0.5 * (row % 2)) * width, row * height
            red = int(generator.uniform(150, 184))
            canvas.rectangle((x, y, x + width * 0.93, y + height * 0.86), fill=(red, 82, 66))


def _night_sky(canvas: ImageDraw.ImageDraw, side: int, generator: np.random.Generator) -> None:
    canvas.rectangle((0, 0, side, side), fill=(24, 28, 66))
    for _ in range(40):
        x, y, r = generator.uniform(0, side), generator.uniform(0, side), generator.uniform(0.003, 0.008) * side
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=(250, 246, 220))
    canvas.ellipse((0.78 * side, 0.07 * side, 0.92 * side, 0.21 * side), fill=(244, 238, 200))


BACKDROPS: dict[str, Callable] = {
    "white background": _plain((248, 248, 248)),
    "grey background": _plain((150, 150, 154)),
    "field": _field,
    "beach": _beach,
    "forest": _forest,
    "city": _city,
    "brick wall": _brick_wall,
    "night sky": _night_sky,
}


def _between(a: Colour, b: Colour, share: float) -> Colour:
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def _shade(colour: Colour, factor: float) -> Colour:
    return tuple(round(part * factor) for part in colour)


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
