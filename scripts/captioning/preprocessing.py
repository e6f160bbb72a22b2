"""How a tagger's images are prepared: as WD14's authors do it, or as the tagger's repository describes it, and never guessed.

WD14 models take [N, side, side, 3], blue first, 0..255, on a white square. For other models, the first of these counts:
the metadata in the ONNX file, `preprocess.json` (deepghs, animetimm, PixAI), `preprocessor_config.json` (transformers) and
`config.json` (timm).
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioning.onnx_file import OnnxFile
from common.errors import ModelError
from common.files import parse_json

DESCRIPTIONS = ("preprocess.json", "preprocessor_config.json", "config.json")

_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Pillow's numbers, which transformers' `resample` is, too."""
_WD14_TAGS = (9_083, 10_861)
"""Tags of WD14's models. Their timm versions, too, take blue first, which timm's config.json cannot say."""
_TRANSFORMERS = ("ViT", "CLIP", "Siglip", "DeiT", "Beit", "Bit")
"""Image processors of transformers that do what their settings say, in this order: resize, crop, rescale, normalize."""
_MAX_SIDE_PX = 4096
_MAX_ASPECT = 50
"""A longer image is cropped before it is scaled by its shorter side: what is cut off would not be seen anyway."""
_RANGES = {(0, 255): (0, 255), (0, 1): (0, 1), (-1, 1): (-1, 1), (1, 1): (-1, 1)}
"""The numbers in a range as it is written -> the range. ONNX writes -1..1 as Normalized_1_1."""

Step = tuple[str, Any, Any]
"""What is done to the image: ("pad", None, colour), ("resize", size, filter), ("fit", (size, longest), filter), ("contain",
(width, height, colour), filter) or ("crop", size, None); a size is (width, height)."""


class _Unclear(Exception):
    """A description that is not understood; the message says why."""


@dataclass(frozen=True)
class Preprocessing:
    """An upright RGB image -> float32 [side, side, 3]. Its repr is part of the key of what was computed with it."""

    steps: tuple[Step, ...]
    side_px: int
    channels: str
    """"RGB" or "BGR"."""
    scale: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Of red, green and blue, from 0..255."""
    offset: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Is added after that."""

    def __call__(self, image: Image.Image) -> np.ndarray:
        for step in self.steps:
            image = _apply(image, *step)
        pixels = np.asarray(image).astype(np.float32)
        if self.scale != (1.0, 1.0, 1.0) or self.offset != (0.0, 0.0, 0.0):
            pixels = pixels * np.float32(self.scale) + np.float32(self.offset)
        return pixels[:, :, ::-1] if self.channels == "BGR" else pixels

    @property
    def gives_whole_levels(self) -> bool:
        """Whether its values are the image's own, 0..255."""
        return self.scale == (1.0, 1.0, 1.0) and self.offset == (0.0, 0.0, 0.0)


def wd14(side_px: int) -> Preprocessing:
    """What WD14's models were trained on; another order, filter or colour gives other tags."""
    return Preprocessing((("pad", None, "white"), ("resize", (side_px, side_px), _FILTERS["bicubic"])), side_px, "BGR")


def image_layout(onnx: OnnxFile) -> tuple[bool, int | None]:
    """Whether the model takes [N, 3, side, side] rather than [N, side, side, 3], and the side if it is fixed. Raises ModelError."""
    (_, shape), *others = onnx.inputs.values()
    if not others and len(shape) == 4 and 3 in (shape[1], shape[3]):
        channels_first = shape[1] == 3 and shape[3] != 3
        height, width = shape[2:] if channels_first else shape[1:3]
        if height == width and (height or 0) <= _MAX_SIDE_PX:
            return channels_first, height
    listed = ", ".join(f"{name} {each.shape}" for name, each in onnx.inputs.items()).replace("None", "?")
    raise ModelError(
        f"{onnx.path}: takes {listed[:200]}, not float images [N, side, side, 3]; set CAPTION_MODEL to a WD14-style tagger"
    )


def find_preprocessing(onnx: OnnxFile, tags: int) -> Preprocessing:
    """The preprocessing for the model with so many tags. Raises ModelError if it is neither WD14's nor described."""
    channels_first, side_px = image_layout(onnx)
    takes_uint8 = any(each.is_uint8 for each in onnx.inputs.values())
    default = None if channels_first or takes_uint8 or side_px is None else wd14(side_px)
    source = "its metadata"
    try:
        found = _from_metadata(onnx.metadata, channels_first, side_px)
        if not found:
            # WD14's repositories have a config.json: of timm's model, which their ONNX file is not.
            names = DESCRIPTIONS if channels_first else DESCRIPTIONS[:2]
            file = next((onnx.path.parent / name for name in names if (onnx.path.parent / name).is_file()), None)
            if file:
                source = file.name
                found = _from_file(file, side_px, tags)
        if found and side_px not in (None, found.side_px):
            raise _Unclear(f"it makes images of {found.side_px} px, and the model takes {side_px} px")
    except (_Unclear, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        reason = str(error) if isinstance(error, _Unclear) else f"it is not in a known format: {type(error).__name__} {error}"
        raise ModelError(
            f"{onnx.path}: {source} describes how to prepare images, and cannot be followed ({' '.join(reason.split())[:200]}); "
            "set CAPTION_MODEL to a WD14-style tagger"
        ) from None
    if found or default:
        return found or default
    raise ModelError(
        f"{onnx.path}: takes images in another form than WD14's models, and neither its metadata nor a {', '.join(DESCRIPTIONS)} "
        "beside it says how to prepare them; put that file of its repository there, or set CAPTION_MODEL to a WD14-style tagger"
    )


def _from_file(file: Path, side_px: int | None, tags: int) -> Preprocessing | None:
    try:
        content = parse_json(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file}: {error.strerror}; make it readable for this user") from None
    return _from_json(file.name, content, side_px, tags)


def _from_json(name: str, content: Any, side_px: int | None, tags: int) -> Preprocessing | None:
    if name == "preprocess.json":
        stages = content
        if isinstance(content, dict):
            stages = next((content[key] for key in ("stages", "test", "val") if key in content), None)
        return _from_stages(stages)
    if name == "preprocessor_config.json":
        return _from_stages(_stages_of_transformers(content))
    pretrained = content.get("pretrained_cfg", content if "input_size" in content else None)
    if not isinstance(pretrained, dict):
        return None
    found = _from_stages(_stages_of_timm(pretrained))
    if tags in _WD14_TAGS:
        return replace(found, steps=wd14(found.side_px).steps, channels="BGR")
    return found


def _from_stages(stages: Any) -> Preprocessing:
    """The `stages` of a preprocess.json: torchvision's transforms by name, each with its arguments."""
    if not isinstance(stages, list) or not stages:
        raise _Unclear("it lists no steps")
    steps: list[Step] = []
    scale, offset, is_tensor = np.ones(3), np.zeros(3), False
    for stage in stages:
        arguments = dict(stage)
        kind = arguments.pop("type")
        if kind in ("to_tensor", "maybe_to_tensor"):
            if not is_tensor:
                scale, offset, is_tensor = scale / 255, offset / 255, True
        elif kind == "normalize":
            mean, std = _per_channel(arguments["mean"]), _per_channel(arguments["std"])
            if not (std > 0).all():
                raise _Unclear("a standard deviation is not above 0")
            scale, offset, is_tensor = scale / std, (offset - mean) / std, True
        elif kind == "rescale":
            factor = _per_channel(arguments.get("rescale_factor", 1 / 255))
            scale, offset, is_tensor = scale * factor, offset * factor, True
        elif kind == "convert_rgb":
            if arguments.get("force_background", "white") not in ("white", None):
                raise _Unclear("transparent images are put on white here")
        elif is_tensor:
            raise _Unclear(f"{kind} comes after the conversion to numbers")
        else:
            steps.append(_step(kind, arguments))
    side_px = _output_side(steps)
    return Preprocessing(tuple(steps), side_px, "RGB", tuple(scale.tolist()), tuple(offset.tolist()))


def _step(kind: str, arguments: dict[str, Any]) -> Step:
    resample = _filter(arguments.get("interpolation", "bilinear"))
    if kind == "center_crop":
        size = arguments["size"] if "size" in arguments else (arguments["height"], arguments["width"])
        return "crop", _size(size), None
    if kind == "pad_to_size":
        colour = arguments.get("background_color", "white")
        return "contain", (*_size(arguments["size"]), colour if isinstance(colour, str) else tuple(colour)), resample
    if kind == "resize":
        size, longest = arguments["size"], arguments.get("max_size")
        if isinstance(size, list | tuple) and len(size) == 2:
            return "resize", _size(size), resample
        return "fit", (_size(size)[0], None if longest is None else _size(longest)[0]), resample
    raise _Unclear(f"the step {str(kind)[:40]!r} is not known")


def _size(value: Any) -> tuple[int, int]:
    """A side, [side] or [height, width] -> (width, height)."""
    sides = list(value) if isinstance(value, list | tuple) else [value]
    if len(sides) not in (1, 2) or not all(type(side) is int and 0 < side <= _MAX_SIDE_PX for side in sides):
        raise _Unclear(f"{str(value)[:40]!r} is not a size")
    return sides[-1], sides[0]


def _filter(value: Any) -> int:
    number = value if type(value) is int else _FILTERS.get(str(value).lower().rpartition(".")[2])
    if number not in _FILTERS.values():
        raise _Unclear(f"the filter {str(value)[:40]!r} is not known")
    return number


def _per_channel(value: Any) -> np.ndarray:
    """One number, or one for each channel."""
    values = np.asarray(value, dtype=np.float64).reshape(-1)
    if len(values) not in (1, 3) or not np.isfinite(values).all():
        raise _Unclear(f"{str(value)[:40]!r} is not one number for each channel")
    return np.broadcast_to(values, 3)


def _output_side(steps: Iterable[Step]) -> int:
    """The side of the images after `steps`, which must not depend on the size of an image."""
    sizes = set()
    for image in (Image.new("RGB", (100, 60)), Image.new("RGB", (61, 97))):
        for step in steps:
            image = _apply(image, *step)
        sizes.add(image.size)
    (width, height) = sizes.pop()
    if sizes or width != height:
        raise _Unclear("its images are not squares of one size")
    return width


def _apply(image: Image.Image, kind: str, argument: Any, how: Any) -> Image.Image:
    """Do one step. "crop" pads with black what is too small, as torchvision does."""
    if kind == "pad":
        return _centred(image, max(image.size), max(image.size), how)
    if kind == "crop":
        width, height = argument
        image = _centred(image, max(width, image.width), max(height, image.height), "black")
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
    if kind == "contain":
        width, height, colour = argument
        ratio = min(width / image.width, height / image.height)
        fitted = _resized(image, (max(1, int(image.width * ratio)), max(1, int(image.height * ratio))), how)
        return _centred(fitted, width, height, colour)
    if kind == "resize":
        return _resized(image, argument, how)
    side, longest = argument  # "fit": the shorter side becomes `side`, the longer one at most `longest`
    shorter = min(image.size)
    if longest is None and max(image.size) > _MAX_ASPECT * shorter:
        image = _apply(image, "crop", tuple(min(edge, _MAX_ASPECT * shorter) for edge in image.size), None)
    size = tuple(side if edge == shorter else int(edge * side / shorter) for edge in image.size)
    if longest and max(size) > longest:
        size = tuple(longest if edge == max(size) else max(1, int(longest * edge / max(size))) for edge in size)
    return _resized(image, size, how)


def _resized(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling(resample))


def _centred(image: Image.Image, width: int, height: int, colour: Any) -> Image.Image:
    if image.size == (width, height):
        return image
    square = Image.new("RGB", (width, height), colour)
    square.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return square


def _stages_of_transformers(config: dict[str, Any]) -> list[dict[str, Any]]:
    """transformers' preprocessor_config.json as stages."""
    processor = str(config.get("image_processor_type", config.get("feature_extractor_type", "ViT")))
    if not processor.startswith(_TRANSFORMERS) or config.get("do_pad") or config.get("crop_pct"):
        raise _Unclear(f"the processor {processor[:60]} is not known")
    stages = []
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    if config.get("do_resize", True):
        size = config["size"]
        if isinstance(size, dict):
            size = size["shortest_edge"] if "shortest_edge" in size else [size["height"], size["width"]]
        elif type(size) is int and crop is None:
            size = [size, size]
        stages.append({"type": "resize", "size": size, "interpolation": config.get("resample", 2)})
    if crop is not None:
        stages.append({"type": "center_crop", "size": [crop["height"], crop["width"]] if isinstance(crop, dict) else crop})
    if config.get("do_rescale", True):
        stages.append({"type": "rescale", "rescale_factor": config.get("rescale_factor", 1 / 255)})
    if config.get("do_normalize", True):
        stages.append({"type": "normalize", "mean": config["image_mean"], "std": config["image_std"]})
    return stages


def _stages_of_timm(config: dict[str, Any]) -> list[dict[str, Any]]:
    """timm's pretrained_cfg as the stages of its evaluation transform."""
    channels, height, width = config["input_size"]
    side = _size([height, width])[0]
    mode, resized = config.get("crop_mode", "center"), math.floor(side / config.get("crop_pct", 1.0))
    if channels != 3 or height != width or mode not in ("center", "squash"):
        raise _Unclear(f"input_size {[channels, height, width]} with crop_mode {str(mode)[:20]} is not known")
    return [
        {"type": "resize", "size": resized if mode == "center" else [resized, resized], "interpolation": config["interpolation"]},
        {"type": "center_crop", "size": side},
        {"type": "to_tensor"},
        {"type": "normalize", "mean": config["mean"], "std": config["std"]},
    ]


def _from_metadata(metadata: dict[str, str], channels_first: bool, side_px: int | None) -> Preprocessing | None:
    """The description in the metadata of an ONNX file: a whole one as JSON, ONNX's own keys for images (MetadataProps of its
    documentation), or mean, std, channel order, range and layout under their usual names. None if there is none."""
    known = {key.lower().removesuffix(".json").replace("-", "_"): value for key, value in metadata.items()}
    for name in DESCRIPTIONS[:2]:
        if name.removesuffix(".json") in known:
            return _from_json(name, parse_json(known[name.removesuffix(".json")].encode()), side_px, 0)

    def value_of(*keys: str) -> str:
        return next((known[key].strip().lower() for key in keys if key in known), "")

    layout = value_of("layout", "input_layout", "data_format", "data_layout")
    if layout in ("nchw", "nhwc") and (layout == "nchw") != channels_first:
        raise _Unclear(f"it says {layout.upper()}, and the model's input has the other layout")
    if value_of("image.colorspacegamma") not in ("", "srgb"):
        raise _Unclear("its colours are not sRGB")
    order = value_of(
        "image.bitmappixelformat", "channel_order", "channels_order", "color_order", "color_format", "color_space", "pixel_format"
    ).removesuffix("8")
    levels = value_of("image.nominalpixelrange", "pixel_range", "input_range", "range")
    mean, std = value_of("mean", "image_mean", "normalize_mean"), value_of("std", "image_std", "normalize_std")
    factor = value_of("rescale_factor", "scale_factor", "scale")
    if not any((order, levels, mean, std, factor)):
        return None
    if order not in ("rgb", "bgr") or side_px is None:
        raise _Unclear("it does not say RGB or BGR" if side_px else "the model leaves the size of its images open")
    scale, offset = _levels(levels, mean, std, factor, channels_first)
    if order == "bgr":  # they are listed in the model's order
        scale, offset = scale[::-1], offset[::-1]
    return replace(wd14(side_px), channels=order.upper(), scale=tuple(scale.tolist()), offset=tuple(offset.tolist()))


def _levels(levels: str, mean: str, std: str, factor: str, channels_first: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of each channel. A mean or standard deviation above 1 counts in 0..255, as OpenCV's users write them."""
    scale, offset = np.ones(3), np.zeros(3)
    if levels:
        limits = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", levels)]
        if len(limits) != 2 or (limits[0], abs(limits[1])) not in _RANGES:
            raise _Unclear(f"the range {levels[:40]!r} is not known")
        lowest, highest = _RANGES[limits[0], abs(limits[1])]
        scale, offset = scale * (highest - lowest) / 255, offset + lowest
    if factor:
        scale, offset = scale * _per_channel(float(factor)), offset * _per_channel(float(factor))
    if mean or std:
        means, stds = (_per_channel(_numbers(text)) if text else None for text in (mean, std))
        means = np.zeros(3) if means is None else means
        stds = np.ones(3) if stds is None else stds
        if not (stds > 0).all():
            raise _Unclear("a standard deviation is not above 0")
        if not levels and not factor and max(means.max(), stds.max()) <= 1:
            scale = scale / 255
        scale, offset = scale / stds, (offset - means) / stds
    elif channels_first and not levels and not factor:
        raise _Unclear("it does not say in which range the values are")
    return scale, offset


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.strip("[]() ").replace(",", " ").split()]
