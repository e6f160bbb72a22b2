"""The node classes of the stand-in, and their descriptions at `/object_info`.

An input's specification is `[type, options]`, or `[list of choices, options]`. Since 0.33.0 it may be dynamic: an input
`COMFY_DYNAMICCOMBO_V3` brings the inputs of the option that is chosen, as `name.input`, and `COMFY_AUTOGROW_V3` brings
`name.prefix0`, `name.prefix1` and so on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.standin_comfyui import nodes

VERSIONS = ("0.33.0", "0.3.64")
"""The versions of ComfyUI that are recorded, the default first."""
ANY_TYPE = ("*", "COMFY_MATCHTYPE_V3")
"""Types that fit every other type."""
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
    is_v3: bool = False
    """Written in the new schema; these classes exist since 0.33.0 only."""
    passes_on: dict[str, str] = field(default_factory=dict)
    """Name -> type of what an output node returns since 0.33.0; in 0.3.64 it returns nothing."""
    output_name: tuple[str, ...] = ()
    """If it differs from `output`."""


def node_class(name: str, version: str) -> NodeClass | None:
    """The class `name`, if this version of ComfyUI has it."""
    node = NODES.get(name)
    return None if node is None or (node.is_v3 and version == VERSIONS[1]) else node


def output_types(name: str, version: str) -> tuple[str, ...]:
    node = NODES[name]
    return node.output if version == VERSIONS[1] else (*node.output, *node.passes_on.values())


def specifications(name: str, folder: Path) -> dict[str, list]:
    """The specification of every input of a class, with the files that `folder` contains now as choices."""
    node = NODES[name]
    found = {**node.inputs, **node.optional}
    for each, subfolder in node.listed.items():
        names = (path.name for path in (folder / subfolder).glob("*") if path.is_file())
        found[each] = [sorted(names), *found[each][1:]]
    return found


def inputs_of(name: str, folder: Path, given: dict[str, Any]) -> dict[str, tuple[list, bool]]:
    """Input -> (specification, whether it is required), with the inputs that dynamic inputs bring for the values `given`."""
    node = NODES[name]
    specified = specifications(name, folder)
    return _expanded({each: (specified[each], each in node.inputs) for each in specified}, given)


def _expanded(inputs: dict[str, tuple[list, bool]], given: dict[str, Any]) -> dict[str, tuple[list, bool]]:
    found: dict[str, tuple[list, bool]] = {}
    for name, (specification, required) in inputs.items():
        kind = specification[0]
        if kind == "COMFY_AUTOGROW_V3":
            template = specification[1]["template"]
            (item,) = template["input"]["required"].values()
            for number in range(template["max"]):
                found[f"{name}.{template['prefix']}{number}"] = (item, number < template["min"])
        elif kind == "COMFY_DYNAMICCOMBO_V3":
            # A missing or unknown option is not checked before the node runs.
            for option in specification[1]["options"]:
                if option["key"] == given.get(name):
                    chosen = {f"{name}.{each}": (value, True) for each, value in option["inputs"]["required"].items()}
                    found |= {name: (specification, required)} | _expanded(chosen, given)
        else:
            found[name] = (specification, required)
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

_IMAGES = {"images": "IMAGE"}
_FILES_IN_OUTPUT = {
    "image_upload": True,
    "image_folder": "output",
    "remote": {"route": "/internal/files/output", "refresh_button": True, "control_after_refresh": "first"},
}


def _combo(default: str, options: list[str], **more: Any) -> list:
    return ["COMBO", {**more, "default": default, "multiselect": False, "options": options}]


def _dynamic_combo(**options: dict[str, list]) -> list:
    return ["COMFY_DYNAMICCOMBO_V3", {"options": [{"key": key, "inputs": {"required": inputs}} for key, inputs in options.items()]}]


_DELIMITER = ["STRING", {"default": "", "multiline": False}]
_PREFIX_V3 = ["STRING", {"default": "ComfyUI", "multiline": False}]
_PNG = {
    "bit_depth": _combo("8-bit", ["8-bit", "16-bit"], advanced=True),
    "input_color_space": _combo("sRGB", ["sRGB"], advanced=True),
}
_EXR = {
    "bit_depth": _combo("32-bit float", ["32-bit float"], advanced=True),
    "input_color_space": _combo("sRGB", ["sRGB", "HDR", "linear"], advanced=True),
}
_SIDE, _CROP = _int(512, 0, 16384, 1), _combo("center", ["disabled", "center"])
_RESIZE_TYPES = {
    "scale dimensions": {"width": _SIDE, "height": _SIDE, "crop": _CROP},
    "scale by multiplier": {"multiplier": _float(1.0, 0.01, 8.0)},
    "scale longer dimension": {"longer_size": _SIDE},
    "scale shorter dimension": {"shorter_size": _SIDE},
    "scale width": {"width": _SIDE},
    "scale height": {"height": _SIDE},
    "scale total pixels": {"megapixels": _float(1.0, 0.01, 16.0)},
    "match size": {"match": _link("IMAGE,MASK"), "crop": _CROP},
    "scale to multiple": {"multiple": _int(8, 1, 16384, 1)},
}

_DESCRIBED = {
    "LoadImage": ("Load Image", "image"),
    "SaveImage": ("Save Image", "image"),
    "PreviewImage": ("Preview Image", "image"),
    "PreviewAny": ("Preview Any", "utils"),
    "CheckpointLoaderSimple": ("Load Checkpoint", "loaders"),
    "CLIPTextEncode": ("CLIP Text Encode (Prompt)", "conditioning"),
    "KSampler": ("KSampler", "sampling"),
    "SaveImageAdvanced": ("Save Image (Advanced)", "image"),
    "ResizeImageMaskNode": ("Resize Image/Mask", "image/transform"),
    "BatchImagesNode": ("Batch Images", "image/batch"),
    "LoadImageOutput": ("Load Image (from Outputs)", "image"),
}
"""Display name and menu category; nothing depends on them."""

NODES: dict[str, NodeClass] = {
    "LoadImage": NodeClass(nodes.load_image, {"image": [[], {"image_upload": True}]}, ("IMAGE", "MASK"), listed={"image": "input"}),
    "SaveImage": NodeClass(
        nodes.save_image, {"images": _link("IMAGE"), "filename_prefix": _PREFIX}, (), is_output=True, passes_on=_IMAGES
    ),
    "PreviewImage": NodeClass(nodes.preview_image, {"images": ["IMAGE"]}, (), is_output=True, passes_on=_IMAGES),
    "PreviewAny": NodeClass(nodes.preview_any, {"source": ["*", {}]}, (), is_output=True, passes_on={"STRING": "STRING"}),
    "LoadImageOutput": NodeClass(nodes.load_image, {"image": ["COMBO", _FILES_IN_OUTPUT]}, ("IMAGE", "MASK")),
    "SaveImageAdvanced": NodeClass(
        nodes.save_image_advanced,
        {"images": _link("IMAGE"), "filename_prefix": _PREFIX_V3, "format": _dynamic_combo(png=_PNG, exr=_EXR)},
        ("IMAGE",),
        is_output=True,
        is_v3=True,
        output_name=("images",),
    ),
    "ResizeImageMaskNode": NodeClass(
        nodes.resize_image,
        {
            "input": ["COMFY_MATCHTYPE_V3", {"template": {"template_id": "input_type", "allowed_types": "IMAGE,MASK"}}],
            "resize_type": _dynamic_combo(**_RESIZE_TYPES),
            "scale_method": _combo("area", list(nodes.FILTERS)),
        },
        ("COMFY_MATCHTYPE_V3",),
        is_v3=True,
        output_name=("resized",),
    ),
    "BatchImagesNode": NodeClass(
        nodes.batch_images,
        {
            "images": [
                "COMFY_AUTOGROW_V3",
                {"template": {"input": {"required": {"image": _link("IMAGE")}}, "prefix": "image", "min": 1, "max": 50}},
            ]
        },
        ("IMAGE",),
        is_v3=True,
    ),
    "ControlNetLoader": NodeClass(
        nodes.loaded("control_net"),
        {"control_net_name": [[], {}]},
        ("CONTROL_NET",),
        listed={"control_net_name": "models/controlnet"},
    ),
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
    "StringConcatenate": NodeClass(
        nodes.concatenate,
        {"string_a": ["STRING", {"multiline": True}], "string_b": ["STRING", {"multiline": True}], "delimiter": _DELIMITER},
        ("STRING",),
    ),
    "PrimitiveString": NodeClass(nodes.value, {"value": ["STRING", {}]}, ("STRING",)),
    "PrimitiveStringMultiline": NodeClass(nodes.value, {"value": _TEXT}, ("STRING",)),
}


REPLACEMENTS = {
    "T2IAdapterLoader": [
        {
            "new_node_id": "ControlNetLoader",
            "old_node_id": "T2IAdapterLoader",
            "old_widget_ids": None,
            "input_mapping": [{"new_id": "control_net_name", "old_id": "t2i_adapter_name"}],
            "output_mapping": None,
        }
    ]
}
"""Classes that 0.33.0 no longer has -> what POST /prompt replaces them by, as at `/node_replacements`."""


def object_info(name: str, folder: Path, version: str) -> dict[str, Any]:
    """The answer at `/object_info/{name}`, without the tooltips."""
    node = NODES[name]
    found = specifications(name, folder)
    display_name, category = _DESCRIBED.get(name, (name, ""))
    described = {"required": {each: found[each] for each in node.inputs}} | ({"optional": node.optional} if node.optional else {})
    if node.is_output:
        hidden = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
        described["hidden"] = {each: [value] for each, value in hidden.items()} if node.is_v3 else hidden
    if name == "PreviewAny":  # it writes no file
        del described["hidden"]
    output = list(output_types(name, version))
    info: dict[str, Any] = {
        "input": described,
        "input_order": {kind: list(inputs) for kind, inputs in described.items()},
        "output": output,
        "output_is_list": [False] * len(output),
        "output_name": [*(node.output_name or node.output), *node.passes_on][: len(output)],
        "name": name,
        "display_name": display_name,
        "description": "",
        "python_module": "nodes",
        "category": category,
        "output_node": node.is_output,
    }
    if version != VERSIONS[1]:
        info |= {"is_input_list": False, "has_intermediate_output": False}
    if node.is_v3:
        flags = dict.fromkeys(("deprecated", "experimental", "dev_only", "api_node"), False)
        info |= {"output_matchtypes": None, "price_badge": None, **flags}
    return info
