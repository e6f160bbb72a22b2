"""The node classes of the stand-in, and their descriptions at `/object_info`.

An input's specification is `[type, options]`, or `[list of choices, options]`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.standin_comfyui import nodes

_SEED = ["INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}]
_TEXT = ["STRING", {"multiline": True, "dynamicPrompts": True}]
_SAMPLERS = ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "lcm", "ddim", "uni_pc", "res_multistep"]
_SCHEDULERS = ["simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal"]
CHECKPOINTS = ["tiny_sd15_random.safetensors", "tiny_sdxl_random.safetensors"]


@dataclass(frozen=True)
class NodeClass:
    """One class: `run(context, **inputs)` returns one value per output."""

    run: Callable[..., tuple]
    inputs: dict[str, list]
    output: tuple[str, ...]
    optional: dict[str, list] = field(default_factory=dict)
    listed: dict[str, str] = field(default_factory=dict)
    """Inputs whose choices are the files of a folder, by the folder."""
    is_output: bool = False


def specifications(name: str, folder: Path) -> dict[str, list]:
    """The specification of every input of a class, with the files that `folder` contains now as choices."""
    node = NODES[name]
    found = {**node.inputs, **node.optional}
    for each, subfolder in node.listed.items():
        names = (path.name for path in (folder / subfolder).glob("*") if path.is_file())
        found[each] = [sorted(names), *found[each][1:]]
    return found


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
_SAMPLING = {"steps": _STEPS, "cfg": _CFG, "sampler_name": [_SAMPLERS, {}], "scheduler": [_SCHEDULERS, {}]}
_METHODS = [list(nodes.FILTERS), {}]
_PREFIX = ["STRING", {"default": "ComfyUI"}]

_DESCRIBED = {
    "LoadImage": ("Load Image", "image"),
    "SaveImage": ("Save Image", "image"),
    "PreviewImage": ("Preview Image", "image"),
    "PreviewAny": ("Preview Any", "utils"),
    "CheckpointLoaderSimple": ("Load Checkpoint", "loaders"),
    "CLIPTextEncode": ("CLIP Text Encode (Prompt)", "conditioning"),
    "KSampler": ("KSampler", "sampling"),
}
"""Display name and menu category; nothing depends on them."""

NODES: dict[str, NodeClass] = {
    "LoadImage": NodeClass(nodes.load_image, {"image": [[], {"image_upload": True}]}, ("IMAGE", "MASK"), listed={"image": "input"}),
    "SaveImage": NodeClass(nodes.save_image, {"images": _link("IMAGE"), "filename_prefix": _PREFIX}, (), is_output=True),
    "PreviewImage": NodeClass(nodes.preview_image, {"images": ["IMAGE"]}, (), is_output=True),
    "PreviewAny": NodeClass(nodes.preview_any, {"source": ["*", {}]}, (), is_output=True),
    "EmptyImage": NodeClass(
        nodes.empty_image,
        {
            "width": _int(512, 1, 16384),
            "height": _int(512, 1, 16384),
            "batch_size": _int(1, 1, 4096),
            "color": _int(0, 0, 0xFFFFFF),
        },
        ("IMAGE",),
    ),
    "ImageScale": NodeClass(
        nodes.image_scale,
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
        nodes.image_scale_to_total_pixels,
        {"image": ["IMAGE"], "upscale_method": _METHODS, "megapixels": _float(1.0, 0.01, 16.0)},
        ("IMAGE",),
    ),
    "FluxKontextImageScale": NodeClass(nodes.unchanged("image"), {"image": ["IMAGE"]}, ("IMAGE",)),
    "ImageInvert": NodeClass(nodes.image_invert, {"image": ["IMAGE"]}, ("IMAGE",)),
    "ImageBlend": NodeClass(
        nodes.image_blend,
        {
            "image1": ["IMAGE"],
            "image2": ["IMAGE"],
            "blend_factor": _float(0.5, 0.0, 1.0),
            "blend_mode": [list(nodes.BLENDS), {}],
        },
        ("IMAGE",),
    ),
    "ImageAddNoise": NodeClass(
        nodes.image_add_noise, {"image": ["IMAGE"], "seed": _SEED, "strength": _float(0.5, 0.0, 1.0)}, ("IMAGE",)
    ),
    "CheckpointLoaderSimple": NodeClass(
        nodes.loaded("model", "clip", "vae"),
        {"ckpt_name": [[], {}]},
        ("MODEL", "CLIP", "VAE"),
        listed={"ckpt_name": "models/checkpoints"},
    ),
    "UNETLoader": NodeClass(
        nodes.loaded("model"),
        {"unet_name": [[], {}], "weight_dtype": [["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"], {}]},
        ("MODEL",),
        listed={"unet_name": "models/diffusion_models"},
    ),
    "CLIPLoader": NodeClass(
        nodes.loaded("clip"),
        {"clip_name": [[], {}], "type": [["stable_diffusion", "sd3", "flux", "lumina2", "qwen_image"], {}]},
        ("CLIP",),
        optional={"device": [["default", "cpu"], {}]},
        listed={"clip_name": "models/text_encoders"},
    ),
    "VAELoader": NodeClass(nodes.loaded("vae"), {"vae_name": [[], {}]}, ("VAE",), listed={"vae_name": "models/vae"}),
    "LoraLoaderModelOnly": NodeClass(
        nodes.unchanged("model"),
        {"model": ["MODEL"], "lora_name": [[], {}], "strength_model": _float(1.0, -100.0, 100.0)},
        ("MODEL",),
        listed={"lora_name": "models/loras"},
    ),
    "CLIPTextEncode": NodeClass(nodes.encode_text, {"text": _TEXT, "clip": _link("CLIP")}, ("CONDITIONING",)),
    "CLIPTextEncodeSDXL": NodeClass(
        nodes.encode_two_texts,
        {
            "clip": ["CLIP"],
            **{name: _int(1024, 0, 16384) for name in ("width", "height", "crop_w", "crop_h", "target_width", "target_height")},
            "text_g": _TEXT,
            "text_l": _TEXT,
        },
        ("CONDITIONING",),
    ),
    "TextEncodeQwenImageEdit": NodeClass(
        nodes.encode_edit, {"clip": ["CLIP"], "prompt": _TEXT}, ("CONDITIONING",), {"vae": ["VAE"], "image": ["IMAGE"]}
    ),
    "TextEncodeQwenImageEditPlus": NodeClass(
        nodes.encode_edit,
        {"clip": ["CLIP"], "prompt": _TEXT},
        ("CONDITIONING",),
        {"vae": ["VAE"], "image1": ["IMAGE"], "image2": ["IMAGE"], "image3": ["IMAGE"]},
    ),
    "ConditioningZeroOut": NodeClass(nodes.unchanged("conditioning"), {"conditioning": ["CONDITIONING"]}, ("CONDITIONING",)),
    "ModelSamplingAuraFlow": NodeClass(
        nodes.unchanged("model"), {"model": ["MODEL"], "shift": _float(1.73, 0.0, 100.0)}, ("MODEL",)
    ),
    "EmptyLatentImage": NodeClass(nodes.empty_latent, _LATENT_SIZE, ("LATENT",)),
    "EmptySD3LatentImage": NodeClass(nodes.empty_latent, _LATENT_SIZE, ("LATENT",)),
    "KSampler": NodeClass(
        nodes.ksampler,
        {"model": _link("MODEL"), "seed": _SEED, **_SAMPLING, **_CONDITIONED, "denoise": _float(1.0, 0.0, 1.0)},
        ("LATENT",),
    ),
    "KSamplerAdvanced": NodeClass(
        nodes.ksampler_advanced,
        {
            "model": ["MODEL"],
            "add_noise": [["enable", "disable"], {}],
            "noise_seed": _SEED,
            **_SAMPLING,
            **_CONDITIONED,
            "start_at_step": _int(0, 0, 10000),
            "end_at_step": _int(10000, 0, 10000),
            "return_with_leftover_noise": [["disable", "enable"], {}],
        },
        ("LATENT",),
    ),
    "RandomNoise": NodeClass(lambda context, noise_seed: (noise_seed,), {"noise_seed": _SEED}, ("NOISE",)),
    "BasicGuider": NodeClass(nodes.unchanged("conditioning"), {"model": ["MODEL"], "conditioning": ["CONDITIONING"]}, ("GUIDER",)),
    "KSamplerSelect": NodeClass(nodes.unchanged("sampler_name"), {"sampler_name": [_SAMPLERS, {}]}, ("SAMPLER",)),
    "BasicScheduler": NodeClass(
        nodes.unchanged("steps"),
        {"model": ["MODEL"], "scheduler": [_SCHEDULERS, {}], "steps": _STEPS, "denoise": _float(1.0, 0.0, 1.0)},
        ("SIGMAS",),
    ),
    "SamplerCustomAdvanced": NodeClass(
        nodes.sampler_custom,
        {"noise": ["NOISE"], "guider": ["GUIDER"], "sampler": ["SAMPLER"], "sigmas": ["SIGMAS"], "latent_image": ["LATENT"]},
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": NodeClass(nodes.vae_decode, {"samples": _link("LATENT"), "vae": _link("VAE")}, ("IMAGE",)),
    "VAEEncode": NodeClass(nodes.vae_encode, {"pixels": ["IMAGE"], "vae": ["VAE"]}, ("LATENT",)),
    "PrimitiveInt": NodeClass(nodes.value, {"value": _int(0, -(2**63), 2**63 - 1)}, ("INT",)),
    "PrimitiveString": NodeClass(nodes.value, {"value": ["STRING", {}]}, ("STRING",)),
    "PrimitiveStringMultiline": NodeClass(nodes.value, {"value": _TEXT}, ("STRING",)),
}


def object_info(name: str, folder: Path) -> dict[str, Any]:
    """The answer at `/object_info/{name}`, without the tooltips."""
    node = NODES[name]
    found = specifications(name, folder)
    display_name, category = _DESCRIBED.get(name, (name, ""))
    described = {"required": {each: found[each] for each in node.inputs}} | ({"optional": node.optional} if node.optional else {})
    if node.is_output:
        described["hidden"] = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
    return {
        "input": described,
        "input_order": {kind: list(inputs) for kind, inputs in described.items()},
        "output": list(node.output),
        "output_is_list": [False] * len(node.output),
        "output_name": list(node.output),
        "name": name,
        "display_name": display_name,
        "description": "",
        "python_module": "nodes",
        "category": category,
        "output_node": node.is_output,
    }
