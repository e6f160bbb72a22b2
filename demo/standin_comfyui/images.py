"""Images drawn from a text, a seed and an optional reference image: what the stand-in's samplers "generate".

The same arguments give the same bytes on every machine; other words, seeds or references give other scenes, varied
enough to be tagged and trained on.
"""

import random

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

Colour = tuple[int, int, int]

# word in the text -> (top, bottom) colour of the background, and its objects
_BACKGROUNDS: dict[str, tuple[Colour, Colour, str]] = {
    "garden": ((150, 190, 120), (60, 110, 50), "lights"),
    "forest": ((90, 130, 90), (30, 60, 35), "trunks"),
    "beach": ((140, 190, 230), (230, 205, 150), "waves"),
    "night": ((15, 18, 45), (45, 35, 70), "lights"),
    "city": ((150, 160, 175), (80, 85, 95), "houses"),
    "street": ((170, 165, 160), (90, 85, 80), "houses"),
    "snow": ((225, 235, 245), (190, 205, 225), "lights"),
    "sunset": ((240, 150, 90), (110, 60, 100), "waves"),
    "studio": ((205, 205, 210), (150, 150, 155), "plain"),
    "room": ((200, 180, 150), (120, 95, 75), "houses"),
}
_SKIN: tuple[Colour, ...] = ((246, 216, 190), (228, 186, 150), (190, 138, 100), (120, 80, 55))
_HAIR: tuple[Colour, ...] = ((35, 28, 25), (90, 58, 36), (190, 150, 90), (140, 60, 40), (200, 200, 205))


def scene(text: str, seed: int, size: tuple[int, int], reference: Image.Image | None = None, strength: float = 1.0) -> Image.Image:
    """An RGB image of `size` pixels.

    `reference` (RGB) becomes the person's face; without one a face is drawn. `strength` in 0..1 is how far the scene
    departs from the reference: 0 gives the reference back.
    """
    rng = random.Random(f"{seed} {text}")
    words = text.lower()
    image = _background(words, size, rng)
    centre, face_height = _pose(words, size, rng)
    image = _person(image, centre, face_height, reference, words, rng)
    image = _light(image, rng)
    if reference is not None and strength < 1.0:
        image = Image.blend(ImageOps.fit(reference, size), image, strength)
    return image


def _background(words: str, size: tuple[int, int], rng: random.Random) -> Image.Image:
    known = [background for word, background in _BACKGROUNDS.items() if word in words]
    top, bottom, kind = (
        known[0] if known else (_colour(rng, 90, 235), _colour(rng, 40, 160), rng.choice(("lights", "plain", "houses")))
    )
    ramp = Image.linear_gradient("L").rotate(rng.uniform(-25, 25), resample=Image.Resampling.BICUBIC).resize(size)
    image = Image.composite(Image.new("RGB", size, bottom), Image.new("RGB", size, top), ramp)
    shapes = image.copy()
    _SCENERY[kind](ImageDraw.Draw(shapes), size, bottom, rng)
    return shapes.filter(ImageFilter.GaussianBlur(max(size) * rng.uniform(0.004, 0.02)))


def _lights(draw: ImageDraw.ImageDraw, size: tuple[int, int], base: Colour, rng: random.Random) -> None:
    for _ in range(rng.randint(15, 40)):
        x, y, radius = rng.randrange(size[0]), rng.randrange(size[1]), size[0] * rng.uniform(0.01, 0.07)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_shade(base, rng.uniform(1.1, 2.2)))


def _trunks(draw: ImageDraw.ImageDraw, size: tuple[int, int], base: Colour, rng: random.Random) -> None:
    for _ in range(rng.randint(5, 12)):
        x, width = rng.randrange(size[0]), size[0] * rng.uniform(0.02, 0.08)
        draw.rectangle((x, 0, x + width, size[1]), fill=_shade(base, rng.uniform(0.4, 0.9)))


def _waves(draw: ImageDraw.ImageDraw, size: tuple[int, int], base: Colour, rng: random.Random) -> None:
    horizon = int(size[1] * rng.uniform(0.35, 0.6))
    for y in range(horizon, size[1], max(2, size[1] // 40)):
        colour = _shade((70, 130, 170), rng.uniform(0.8, 1.3))
        draw.rectangle((0, y, size[0], y + size[1] // 60), fill=colour)
    draw.rectangle((0, int(size[1] * 0.85), size[0], size[1]), fill=base)


def _houses(draw: ImageDraw.ImageDraw, size: tuple[int, int], base: Colour, rng: random.Random) -> None:
    for _ in range(rng.randint(4, 9)):
        left, width, top = rng.randrange(size[0]), size[0] * rng.uniform(0.1, 0.3), size[1] * rng.uniform(0.05, 0.6)
        wall = _shade(base, rng.uniform(0.6, 1.6))
        draw.rectangle((left, top, left + width, size[1]), fill=wall)
        for row in range(int(top) + 4, size[1], max(6, size[1] // 12)):
            draw.rectangle((left + width * 0.2, row, left + width * 0.4, row + size[1] // 30), fill=_shade(wall, 1.4))


def _plain(draw: ImageDraw.ImageDraw, size: tuple[int, int], base: Colour, rng: random.Random) -> None:
    radius = size[0] * rng.uniform(0.3, 0.6)
    x, y = size[0] * rng.uniform(0.3, 0.7), size[1] * rng.uniform(0.2, 0.5)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_shade(base, 1.25))


_SCENERY = {"lights": _lights, "trunks": _trunks, "waves": _waves, "houses": _houses, "plain": _plain}


def _pose(words: str, size: tuple[int, int], rng: random.Random) -> tuple[tuple[float, float], float]:
    """Centre and height of the face in pixels."""
    share = rng.uniform(0.28, 0.4)
    if "close" in words:
        share = rng.uniform(0.55, 0.7)
    elif "full body" in words or "full-body" in words:
        share = rng.uniform(0.14, 0.2)
    height = share * size[1]
    return (size[0] * rng.uniform(0.35, 0.65), max(height * 0.65, size[1] * rng.uniform(0.3, 0.42))), height


def _person(
    image: Image.Image,
    centre: tuple[float, float],
    face_height: float,
    reference: Image.Image | None,
    words: str,
    rng: random.Random,
) -> Image.Image:
    face_width = face_height * rng.uniform(0.72, 0.85)
    x, y = centre
    hair, cloth = rng.choice(_HAIR), _colour(rng, 30, 220)
    draw = ImageDraw.Draw(image)
    draw.ellipse((x - face_width * 0.68, y - face_height * 0.66, x + face_width * 0.68, y + face_height * 0.85), fill=hair)
    shoulders = face_width * rng.uniform(1.1, 1.5)
    draw.rounded_rectangle(
        (x - shoulders, y + face_height * 0.62, x + shoulders, image.height * 1.3), radius=int(face_width * 0.6), fill=cloth
    )
    face = _drawn_face(hair, rng) if reference is None else ImageOps.fit(reference, (160, 200))
    if "side" in words or "profile" in words:
        face = ImageOps.mirror(face.resize((112, 200))).resize((160, 200))
    face = face.rotate(rng.uniform(-12, 12), resample=Image.Resampling.BICUBIC, fillcolor=face.getpixel((80, 170)))
    box = (max(1, int(face_width)), max(1, int(face_height)))
    mask = Image.new("L", (160, 200))
    ImageDraw.Draw(mask).ellipse((10, 8, 150, 192), fill=255)
    mask = mask.filter(ImageFilter.GaussianBlur(6))
    image.paste(face.resize(box), (int(x - box[0] / 2), int(y - box[1] / 2)), mask.resize(box))
    return image


def _drawn_face(hair: Colour, rng: random.Random) -> Image.Image:
    """A face of 160 x 200 pixels, with eyes and mouth where a detector expects them."""
    skin = rng.choice(_SKIN)
    face = Image.new("RGB", (160, 200), skin)
    draw = ImageDraw.Draw(face)
    iris = _colour(rng, 30, 150)
    for eye in (52, 108):
        draw.ellipse((eye - 14, 78, eye + 14, 94), fill=(245, 245, 245))
        draw.ellipse((eye - 7, 79, eye + 7, 93), fill=iris)
        draw.line((eye - 16, 66, eye + 16, 64), fill=_shade(skin, 0.45), width=4)
    draw.line((80, 92, 74, 124, 82, 126), fill=_shade(skin, 0.75), width=3)
    smile = rng.randint(2, 16)
    draw.chord((54, 140 - smile, 106, 146 + smile), 0, 180, fill=(185, 75, 80))
    draw.pieslice((-40, -60, 200, 56), 0, 360, fill=hair)
    return face.filter(ImageFilter.GaussianBlur(1.2))


def _light(image: Image.Image, rng: random.Random) -> Image.Image:
    """Add light from one side and the grain of a photograph."""
    ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(image.size)
    lit = Image.blend(image, ImageChops.soft_light(image, Image.merge("RGB", (ramp,) * 3)), rng.uniform(0.2, 0.7))
    small = (max(1, image.width // 2), max(1, image.height // 2))
    grain = Image.frombytes("L", small, rng.randbytes(small[0] * small[1])).resize(image.size)
    return Image.blend(lit, Image.merge("RGB", (grain,) * 3), 0.04)


def _colour(rng: random.Random, low: int, high: int) -> Colour:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, int(part * factor)) for part in colour)
    return red, green, blue
