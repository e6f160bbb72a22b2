"""The stand-in's nodes: each is a function of a context and its inputs that returns one value per output.

There are no models and text encoders, so a latent is a list of images.
"""

import hashlib
import json
import os
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageOps
from PIL.PngImagePlugin import PngInfo

from demo.standin_comfyui.images import scene


@dataclass(frozen=True)
class Latent:
    """A latent, represented by images; of an `empty` one only the size counts."""

    images: list[Image.Image]
    empty: bool


@dataclass
class Context:
    """What a running node has access to besides its inputs."""

    folder: Path
    prompt: dict[str, Any]
    extra_pnginfo: dict[str, Any] | None
    shown: dict[str, Any] = field(default_factory=dict)
    """The node's output for the history: {"images": [...]}."""


def input_file(folder: Path, name: str) -> Path:
    """The path of `name`, `name [output]` or `name [temp]`."""
    for kind in ("input", "output", "temp"):
        if name.endswith(f"[{kind}]"):
            return folder / kind / name.removesuffix(f"[{kind}]").rstrip()
    return folder / "input" / name


def file_hash(path: Path) -> str:
    """SHA-256 of a file; when it changes, a LoadImage node runs again."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_image(context: Context, image: str) -> tuple:
    path = input_file(context.folder, image)
    with Image.open(path) as opened:
        turned = ImageOps.exif_transpose(opened)
        mask = turned.getchannel("A") if "A" in turned.getbands() else Image.new("L", (64, 64))
        return [turned.convert("RGB")], mask


def empty_image(context: Context, width: int, height: int, batch_size: int, color: int) -> tuple:
    colour = (color >> 16 & 255, color >> 8 & 255, color & 255)
    return ([Image.new("RGB", (width, height), colour) for _ in range(batch_size)],)


FILTERS = {
    "nearest-exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def image_scale(context: Context, image: list, upscale_method: str, width: int, height: int, crop: str) -> tuple:
    method = FILTERS[upscale_method]
    if crop == "center":
        return ([ImageOps.fit(frame, (width, height), method) for frame in image],)
    return ([frame.resize((width, height), method) for frame in image],)


def image_scale_to_total_pixels(context: Context, image: list, upscale_method: str, megapixels: float) -> tuple:
    def scaled(frame: Image.Image) -> Image.Image:
        factor = (megapixels * 1024 * 1024 / (frame.width * frame.height)) ** 0.5
        size = (max(1, round(frame.width * factor)), max(1, round(frame.height * factor)))
        return frame.resize(size, FILTERS[upscale_method])

    return ([scaled(frame) for frame in image],)


def image_invert(context: Context, image: list) -> tuple:
    return ([ImageChops.invert(frame) for frame in image],)


BLENDS = {
    "normal": lambda below, above: above,
    "multiply": ImageChops.multiply,
    "screen": ImageChops.screen,
    "overlay": ImageChops.overlay,
    "soft_light": ImageChops.soft_light,
    "difference": ImageChops.difference,
}


def image_blend(context: Context, image1: list, image2: list, blend_factor: float, blend_mode: str) -> tuple:
    blended = []
    for number, below in enumerate(image1):
        above = image2[number % len(image2)].resize(below.size)
        blended.append(Image.blend(below, BLENDS[blend_mode](below, above), blend_factor))
    return (blended,)


def image_add_noise(context: Context, image: list, seed: int, strength: float) -> tuple:
    rng = random.Random(seed)
    noisy = []
    for frame in image:
        grain = Image.frombytes("RGB", frame.size, rng.randbytes(frame.width * frame.height * 3))
        noisy.append(Image.blend(frame, grain, min(1.0, strength)))
    return (noisy,)


def batch_images(context: Context, images: dict[str, list]) -> tuple:
    """All images in the size of the first."""
    batch = [frame for each in images.values() for frame in each]
    return ([frame.resize(batch[0].size) for frame in batch],)


def resize_image(context: Context, input: list, resize_type: dict[str, Any], scale_method: str) -> tuple:
    method, kind = FILTERS[scale_method], resize_type["resize_type"]

    def size(frame: Image.Image) -> tuple[int, int]:
        width, height = frame.size
        match kind:
            case "scale dimensions":
                return resize_type["width"] or width, resize_type["height"] or height
            case "match size":
                return resize_type["match"][0].size
            case "scale to multiple":
                multiple = resize_type["multiple"]
                return max(multiple, width // multiple * multiple), max(multiple, height // multiple * multiple)
        factors = {
            "scale by multiplier": lambda: resize_type["multiplier"],
            "scale longer dimension": lambda: resize_type["longer_size"] / max(width, height),
            "scale shorter dimension": lambda: resize_type["shorter_size"] / min(width, height),
            "scale width": lambda: resize_type["width"] / width,
            "scale height": lambda: resize_type["height"] / height,
            "scale total pixels": lambda: (resize_type["megapixels"] * 1024 * 1024 / (width * height)) ** 0.5,
        }
        factor = factors[kind]()
        return max(1, round(width * factor)), max(1, round(height * factor))

    if resize_type.get("crop") == "center":
        return ([ImageOps.fit(frame, size(frame), method) for frame in input],)
    return ([frame.resize(size(frame), method) for frame in input],)


def save_image(context: Context, images: list, filename_prefix: str) -> tuple:
    _write_pngs(context, images, filename_prefix, "output")
    return (images,)


def save_image_advanced(context: Context, images: list, filename_prefix: str, format: dict[str, Any]) -> tuple:
    _write_pngs(context, images, filename_prefix, "output", ending=f".{format['format']}")
    return (images,)


def preview_image(context: Context, images: list) -> tuple:
    letters = "".join(random.choice(string.ascii_lowercase) for _ in range(5))
    _write_pngs(context, images, f"ComfyUI_temp_{letters}", "temp")
    return (images,)


def preview_any(context: Context, source: Any) -> tuple:
    context.shown["text"] = [str(source)]
    return (str(source),)


def _write_pngs(context: Context, images: list, prefix: str, kind: str, ending: str = "_.png") -> None:
    """Write one file per image, numbered after the files that exist, and list them in the output.

    Only PNG files are real: one with another ending contains a PNG too.
    """
    base = context.folder / kind
    subfolder, name = os.path.split(os.path.normpath(prefix))
    target = Path(os.path.abspath(base / subfolder))
    if not target.is_relative_to(base):
        raise Exception(f"saving to {target}, outside of {base}, is not allowed")
    target.mkdir(parents=True, exist_ok=True)
    texts = PngInfo()
    texts.add_text("prompt", json.dumps(context.prompt))
    for key, value in (context.extra_pnginfo or {}).items():
        texts.add_text(key, json.dumps(value))
    records = []
    for number, image in enumerate(images, start=_next_number(target, name)):
        filename = f"{name}_{number:05}{ending}"
        image.save(target / filename, "PNG", pnginfo=texts, compress_level=4)
        records.append({"filename": filename, "subfolder": subfolder, "type": kind})
    context.shown["images"] = records


def _next_number(folder: Path, name: str) -> int:
    numbers = [0]
    for path in folder.iterdir():
        digits = re.split("[_.]", path.name.removeprefix(f"{name}_"))[0]
        if path.name.startswith(f"{name}_") and digits.isdigit():
            numbers.append(int(digits))
    return max(numbers) + 1


def loaded(*names: str) -> Callable[..., tuple]:
    """A loader: its outputs are names."""
    return lambda context, **inputs: names


def unchanged(first: str) -> Callable[..., tuple]:
    """A node that returns its input `first` unchanged."""
    return lambda context, **inputs: (inputs[first],)


def encode_text(context: Context, clip: Any, text: str) -> tuple:
    return ({"text": text, "reference": None},)


def encode_two_texts(context: Context, text_g: str, text_l: str, **_sizes: Any) -> tuple:
    return ({"text": text_g if text_g == text_l else f"{text_g} {text_l}", "reference": None},)


def encode_edit(context: Context, clip: Any, prompt: str, vae: Any = None, **images: list) -> tuple:
    first = next((images[name] for name in ("image", "image1", "image2", "image3") if images.get(name)), None)
    return ({"text": prompt, "reference": first[0] if first else None},)


def empty_latent(context: Context, width: int, height: int, batch_size: int) -> tuple:
    return (Latent([Image.new("RGB", (width, height), (127, 127, 127)) for _ in range(batch_size)], empty=True),)


def vae_encode(context: Context, pixels: list, vae: Any) -> tuple:
    return (Latent([image.resize((image.width // 8 * 8, image.height // 8 * 8)) for image in pixels], empty=False),)


def vae_decode(context: Context, samples: Latent, vae: Any) -> tuple:
    return (samples.images,)


def _sampled(latent: Latent, conditioning: dict, seed: int, denoise: float = 1.0) -> tuple:
    images = []
    for number, image in enumerate(latent.images):
        reference = conditioning["reference"] if latent.empty else image
        images.append(scene(conditioning["text"], seed + number, image.size, reference, denoise))
    return (Latent(images, empty=False),)


def ksampler(context: Context, seed: int, positive: dict, latent_image: Latent, denoise: float, **_rest: Any) -> tuple:
    return _sampled(latent_image, positive, seed, denoise)


def ksampler_advanced(context: Context, noise_seed: int, positive: dict, latent_image: Latent, **_rest: Any) -> tuple:
    return _sampled(latent_image, positive, noise_seed)


def sampler_custom(context: Context, noise: int, guider: dict, latent_image: Latent, **_rest: Any) -> tuple:
    return _sampled(latent_image, guider, noise) * 2


def value(context: Context, value: Any) -> tuple:
    return (value,)


def concatenate(context: Context, string_a: str, string_b: str, delimiter: str) -> tuple:
    return (delimiter.join((string_a, string_b)),)
