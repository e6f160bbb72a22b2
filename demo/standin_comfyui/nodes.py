"""The node classes that the stand-in knows: what each takes and gives, and what it does.

Models and text encoders are stand-ins, so a latent is simply a list of pictures. An input's specification is what
`/object_info` says about it: `[type, options]`, or `[list of choices, options]`.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageOps
from PIL.PngImagePlugin import PngInfo

from demo.standin_comfyui.pictures import scene

SEED = ["INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}]
TEXT = ["STRING", {"multiline": True, "dynamicPrompts": True}]
SAMPLERS = ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "lcm", "ddim", "uni_pc", "res_multistep"]
SCHEDULERS = ["simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal"]
CHECKPOINTS = ["tiny_sd15_random.safetensors", "tiny_sdxl_random.safetensors"]
PREVIEW_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Latent:
    """Pictures in disguise; `empty` ones have only their size."""

    pictures: list[Image.Image]
    empty: bool


@dataclass
class Context:
    """What a running node may see besides its inputs."""

    folder: Path
    prompt: dict[str, Any]
    extra_pnginfo: dict[str, Any] | None
    shown: dict[str, Any] = field(default_factory=dict)
    """What the node hands to the history: {"images": [...]}."""


@dataclass(frozen=True)
class NodeClass:
    """One class: `run(context, **inputs)` returns one value per output."""

    run: Callable[..., tuple]
    inputs: dict[str, list]
    output: tuple[str, ...]
    optional: dict[str, list] = field(default_factory=dict)
    is_output: bool = False
    display_name: str = ""
    category: str = ""


def input_file(folder: Path, name: str) -> Path:
    """Where `name`, `name [output]` or `name [temp]` lies."""
    for kind in ("input", "output", "temp"):
        if name.endswith(f"[{kind}]"):
            return folder / kind / name.removesuffix(f"[{kind}]").rstrip()
    return folder / "input" / name


def file_hash(path: Path) -> str:
    """What makes a LoadImage node run again."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load_image(context: Context, image: str) -> tuple:
    path = input_file(context.folder, image)
    with Image.open(path) as opened:
        turned = ImageOps.exif_transpose(opened)
        mask = turned.getchannel("A") if "A" in turned.getbands() else Image.new("L", (64, 64))
        return [turned.convert("RGB")], mask


def _empty_image(context: Context, width: int, height: int, batch_size: int, color: int) -> tuple:
    colour = (color >> 16 & 255, color >> 8 & 255, color & 255)
    return ([Image.new("RGB", (width, height), colour) for _ in range(batch_size)],)


_FILTERS = {
    "nearest-exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def _image_scale(context: Context, image: list, upscale_method: str, width: int, height: int, crop: str) -> tuple:
    method = _FILTERS[upscale_method]
    if crop == "center":
        return ([ImageOps.fit(picture, (width, height), method) for picture in image],)
    return ([picture.resize((width, height), method) for picture in image],)


def _image_scale_to_total_pixels(context: Context, image: list, upscale_method: str, megapixels: float) -> tuple:
    def scaled(picture: Image.Image) -> Image.Image:
        factor = (megapixels * 1024 * 1024 / (picture.width * picture.height)) ** 0.5
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        return picture.resize(size, _FILTERS[upscale_method])

    return ([scaled(picture) for picture in image],)


def _image_invert(context: Context, image: list) -> tuple:
    return ([ImageChops.invert(picture) for picture in image],)


_BLENDS = {
    "normal": lambda below, above: above,
    "multiply": ImageChops.multiply,
    "screen": ImageChops.screen,
    "overlay": ImageChops.overlay,
    "soft_light": ImageChops.soft_light,
    "difference": ImageChops.difference,
}


def _image_blend(context: Context, image1: list, image2: list, blend_factor: float, blend_mode: str) -> tuple:
    blended = []
    for number, below in enumerate(image1):
        above = image2[number % len(image2)].resize(below.size)
        blended.append(Image.blend(below, _BLENDS[blend_mode](below, above), blend_factor))
    return (blended,)


def _image_add_noise(context: Context, image: list, seed: int, strength: float) -> tuple:
    draws = random.Random(seed)
    noisy = []
    for picture in image:
        grain = Image.frombytes("RGB", picture.size, draws.randbytes(picture.width * picture.height * 3))
        noisy.append(Image.blend(picture, grain, min(1.0, strength)))
    return (noisy,)


def _save_image(context: Context, images: list, filename_prefix: str) -> tuple:
    _write_pngs(context, images, filename_prefix, "output")
    return ()


def _preview_image(context: Context, images: list) -> tuple:
    letters = "".join(random.choice(PREVIEW_LETTERS) for _ in range(5))
    _write_pngs(context, images, f"ComfyUI_temp_{letters}", "temp")
    return ()


def _write_pngs(context: Context, images: list, prefix: str, kind: str) -> None:
    """Write one PNG per picture, numbered from what lies on the disk, and show them."""
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
    for number, picture in enumerate(images, start=_next_number(target, name)):
        filename = f"{name}_{number:05}_.png"
        picture.save(target / filename, pnginfo=texts, compress_level=4)
        records.append({"filename": filename, "subfolder": subfolder, "type": kind})
    context.shown["images"] = records


def _next_number(folder: Path, name: str) -> int:
    numbers = [0]
    for path in folder.iterdir():
        digits = path.name.removeprefix(f"{name}_").split("_")[0]
        if path.name.startswith(f"{name}_") and digits.isdigit():
            numbers.append(int(digits))
    return max(numbers) + 1


def _loaded(*names: str) -> Callable[..., tuple]:
    """A loader: its outputs are just names."""
    return lambda context, **inputs: names


def _unchanged(first: str) -> Callable[..., tuple]:
    """A node that hands its input `first` through."""
    return lambda context, **inputs: (inputs[first],)


def _encode_text(context: Context, clip: Any, text: str) -> tuple:
    return ({"text": text, "reference": None},)


def _encode_two_texts(context: Context, text_g: str, text_l: str, **_sizes: Any) -> tuple:
    return ({"text": text_g if text_g == text_l else f"{text_g} {text_l}", "reference": None},)


def _encode_edit(context: Context, clip: Any, prompt: str, vae: Any = None, **images: list) -> tuple:
    first = next((images[name] for name in ("image", "image1", "image2", "image3") if images.get(name)), None)
    return ({"text": prompt, "reference": first[0] if first else None},)


def _empty_latent(context: Context, width: int, height: int, batch_size: int) -> tuple:
    return (Latent([Image.new("RGB", (width, height), (127, 127, 127)) for _ in range(batch_size)], empty=True),)


def _vae_encode(context: Context, pixels: list, vae: Any) -> tuple:
    return (Latent([picture.resize((picture.width // 8 * 8, picture.height // 8 * 8)) for picture in pixels], empty=False),)


def _vae_decode(context: Context, samples: Latent, vae: Any) -> tuple:
    return (samples.pictures,)


def _sampled(latent: Latent, conditioning: dict, seed: int, denoise: float = 1.0) -> tuple:
    pictures = []
    for number, picture in enumerate(latent.pictures):
        reference = conditioning["reference"] if latent.empty else picture
        pictures.append(scene(conditioning["text"], seed + number, picture.size, reference, denoise))
    return (Latent(pictures, empty=False),)


def _ksampler(context: Context, seed: int, positive: dict, latent_image: Latent, denoise: float, **_rest: Any) -> tuple:
    return _sampled(latent_image, positive, seed, denoise)


def _ksampler_advanced(context: Context, noise_seed: int, positive: dict, latent_image: Latent, **_rest: Any) -> tuple:
    return _sampled(latent_image, positive, noise_seed)


def _sampler_custom(context: Context, noise: int, guider: dict, latent_image: Latent, **_rest: Any) -> tuple:
    return _sampled(latent_image, guider, noise) * 2


def _value(context: Context, value: Any) -> tuple:
    return (value,)


def _int(default: int, low: int, high: int, step: int | None = None) -> list:
    return ["INT", {"default": default, "min": low, "max": high} | ({} if step is None else {"step": step})]


def _float(default: float, low: float, high: float) -> list:
    return ["FLOAT", {"default": default, "min": low, "max": high, "step": 0.01}]


def _link(kind: str) -> list:
    return [kind, {}]


_STEPS = _int(20, 1, 10000)
_CFG = ["FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}]
_LATENT_SIZE = {"width": _int(512, 16, 16384, 8), "height": _int(512, 16, 16384, 8), "batch_size": _int(1, 1, 4096)}
_CONDITIONED = {"positive": _link("CONDITIONING"), "negative": _link("CONDITIONING"), "latent_image": _link("LATENT")}
_SAMPLING = {"steps": _STEPS, "cfg": _CFG, "sampler_name": [SAMPLERS, {}], "scheduler": [SCHEDULERS, {}]}
_METHODS = [list(_FILTERS), {}]
_PREFIX = ["STRING", {"default": "ComfyUI"}]

NODES: dict[str, NodeClass] = {
    "LoadImage": NodeClass(
        _load_image, {"image": [[], {"image_upload": True}]}, ("IMAGE", "MASK"), {}, False, "Load Image", "image"
    ),
    "SaveImage": NodeClass(
        _save_image, {"images": _link("IMAGE"), "filename_prefix": _PREFIX}, (), {}, True, "Save Image", "image"
    ),
    "PreviewImage": NodeClass(_preview_image, {"images": ["IMAGE"]}, (), {}, True, "Preview Image", "image"),
    "EmptyImage": NodeClass(
        _empty_image,
        {
            "width": _int(512, 1, 16384),
            "height": _int(512, 1, 16384),
            "batch_size": _int(1, 1, 4096),
            "color": _int(0, 0, 0xFFFFFF),
        },
        ("IMAGE",),
    ),
    "ImageScale": NodeClass(
        _image_scale,
        {
            "image": ["IMAGE"],
            "upscale_method": _METHODS,
            "width": _int(512, 0, 16384),
            "height": _int(512, 0, 16384),
            "crop": [["disabled", "center"], {}],
        },
        ("IMAGE",),
    ),
    "ImageScaleToTotalPixels": NodeClass(
        _image_scale_to_total_pixels,
        {"image": ["IMAGE"], "upscale_method": _METHODS, "megapixels": _float(1.0, 0.01, 16.0)},
        ("IMAGE",),
    ),
    "FluxKontextImageScale": NodeClass(_unchanged("image"), {"image": ["IMAGE"]}, ("IMAGE",)),
    "ImageInvert": NodeClass(_image_invert, {"image": ["IMAGE"]}, ("IMAGE",)),
    "ImageBlend": NodeClass(
        _image_blend,
        {
            "image1": ["IMAGE"],
            "image2": ["IMAGE"],
            "blend_factor": _float(0.5, 0.0, 1.0),
            "blend_mode": [list(_BLENDS), {}],
        },
        ("IMAGE",),
    ),
    "ImageAddNoise": NodeClass(_image_add_noise, {"image": ["IMAGE"], "seed": SEED, "strength": _float(0.5, 0.0, 1.0)}, ("IMAGE",)),
    "CheckpointLoaderSimple": NodeClass(
        _loaded("model", "clip", "vae"),
        {"ckpt_name": [CHECKPOINTS, {}]},
        ("MODEL", "CLIP", "VAE"),
        {},
        False,
        "Load Checkpoint",
        "loaders",
    ),
    "CLIPTextEncode": NodeClass(
        _encode_text,
        {"text": TEXT, "clip": _link("CLIP")},
        ("CONDITIONING",),
        {},
        False,
        "CLIP Text Encode (Prompt)",
        "conditioning",
    ),
    "CLIPTextEncodeSDXL": NodeClass(
        _encode_two_texts,
        {
            "clip": ["CLIP"],
            **{name: _int(1024, 0, 16384) for name in ("width", "height", "crop_w", "crop_h", "target_width", "target_height")},
            "text_g": TEXT,
            "text_l": TEXT,
        },
        ("CONDITIONING",),
    ),
    "TextEncodeQwenImageEdit": NodeClass(
        _encode_edit, {"clip": ["CLIP"], "prompt": TEXT}, ("CONDITIONING",), {"vae": ["VAE"], "image": ["IMAGE"]}
    ),
    "TextEncodeQwenImageEditPlus": NodeClass(
        _encode_edit,
        {"clip": ["CLIP"], "prompt": TEXT},
        ("CONDITIONING",),
        {"vae": ["VAE"], "image1": ["IMAGE"], "image2": ["IMAGE"], "image3": ["IMAGE"]},
    ),
    "ConditioningZeroOut": NodeClass(_unchanged("conditioning"), {"conditioning": ["CONDITIONING"]}, ("CONDITIONING",)),
    "ModelSamplingAuraFlow": NodeClass(_unchanged("model"), {"model": ["MODEL"], "shift": _float(1.73, 0.0, 100.0)}, ("MODEL",)),
    "EmptyLatentImage": NodeClass(_empty_latent, _LATENT_SIZE, ("LATENT",)),
    "EmptySD3LatentImage": NodeClass(_empty_latent, _LATENT_SIZE, ("LATENT",)),
    "KSampler": NodeClass(
        _ksampler,
        {"model": _link("MODEL"), "seed": SEED, **_SAMPLING, **_CONDITIONED, "denoise": _float(1.0, 0.0, 1.0)},
        ("LATENT",),
        {},
        False,
        "KSampler",
        "sampling",
    ),
    "KSamplerAdvanced": NodeClass(
        _ksampler_advanced,
        {
            "model": ["MODEL"],
            "add_noise": [["enable", "disable"], {}],
            "noise_seed": SEED,
            **_SAMPLING,
            **_CONDITIONED,
            "start_at_step": _int(0, 0, 10000),
            "end_at_step": _int(10000, 0, 10000),
            "return_with_leftover_noise": [["disable", "enable"], {}],
        },
        ("LATENT",),
    ),
    "RandomNoise": NodeClass(lambda context, noise_seed: (noise_seed,), {"noise_seed": SEED}, ("NOISE",)),
    "BasicGuider": NodeClass(_unchanged("conditioning"), {"model": ["MODEL"], "conditioning": ["CONDITIONING"]}, ("GUIDER",)),
    "KSamplerSelect": NodeClass(_unchanged("sampler_name"), {"sampler_name": [SAMPLERS, {}]}, ("SAMPLER",)),
    "BasicScheduler": NodeClass(
        _unchanged("steps"),
        {"model": ["MODEL"], "scheduler": [SCHEDULERS, {}], "steps": _STEPS, "denoise": _float(1.0, 0.0, 1.0)},
        ("SIGMAS",),
    ),
    "SamplerCustomAdvanced": NodeClass(
        _sampler_custom,
        {"noise": ["NOISE"], "guider": ["GUIDER"], "sampler": ["SAMPLER"], "sigmas": ["SIGMAS"], "latent_image": ["LATENT"]},
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": NodeClass(_vae_decode, {"samples": _link("LATENT"), "vae": _link("VAE")}, ("IMAGE",)),
    "VAEEncode": NodeClass(_vae_encode, {"pixels": ["IMAGE"], "vae": ["VAE"]}, ("LATENT",)),
    "PrimitiveInt": NodeClass(_value, {"value": _int(0, -(2**63), 2**63 - 1)}, ("INT",)),
    "PrimitiveString": NodeClass(_value, {"value": ["STRING", {}]}, ("STRING",)),
    "PrimitiveStringMultiline": NodeClass(_value, {"value": TEXT}, ("STRING",)),
}


def object_info(name: str, folder: Path) -> dict[str, Any]:
    """What `/object_info/{name}` says, without the tooltips."""
    node = NODES[name]
    required = dict(node.inputs)
    if name == "LoadImage":
        lying = sorted(path.name for path in (folder / "input").iterdir() if path.is_file())
        required["image"] = [lying, node.inputs["image"][1]]
    described = {"required": required} | ({"optional": node.optional} if node.optional else {})
    if node.is_output:
        described["hidden"] = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
    return {
        "input": described,
        "input_order": {kind: list(inputs) for kind, inputs in described.items()},
        "output": list(node.output),
        "output_is_list": [False] * len(node.output),
        "output_name": list(node.output),
        "name": name,
        "display_name": node.display_name or name,
        "description": "",
        "python_module": "nodes",
        "category": node.category,
        "output_node": node.is_output,
    }
