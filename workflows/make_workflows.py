"""Writes the included workflows from `shots.toml`: `workflow_api.json` and `workflows/qwen_image_edit_2511/`.

    python workflows/make_workflows.py

Shot k has the node ids from 100 k on; nodes that the shots share have ids below 100. Edit the shots, the texts or the
settings below and run it again; or edit the workflow files themselves, in ComfyUI or by hand: nothing else reads this.
"""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PERSON = "A realistic photograph of a person."
INSTRUCTION = "Create a new realistic photograph of the person in Picture 1."
IDENTITY = (
    "Keep the identity of the person exactly as in Picture 1: the same facial features, face shape, eyes, skin tone, hair and "
    "apparent age. Do not copy the pose, clothing, background or lighting of Picture 1."
)
TEXTURE = (
    "Natural skin texture with fine pores, detailed eyes, real fabric, true-to-life colours, "
    "fine film grain, sharp focus on the face."
)
# SDXL's sizes of about one megapixel: node id, width, height.
SIZES = {
    "square": ("30", 1024, 1024),
    "portrait": ("31", 896, 1152),
    "tall": ("32", 832, 1216),
    "very_tall": ("33", 768, 1344),
    "landscape": ("34", 1152, 896),
    "wide": ("35", 1216, 832),
}
# The smaller the face, the less of it Z-Image may redraw: at 0.25 a face of 60 pixels becomes another person's.
DENOISE = {"close": 0.25, "half": 0.2, "full": 0.15}

Workflow = dict[str, dict[str, Any]]


def main() -> None:
    shots = tomllib.loads((FOLDER / "shots.toml").read_text(encoding="utf-8"))["shots"]
    _write(FOLDER.parent / "workflow_api.json", qwen_2509_and_z_image(shots))
    _write(FOLDER / "qwen_image_edit_2511" / "workflow_api.json", qwen_2511(shots))


def qwen_2509_and_z_image(shots: list[dict[str, str]]) -> Workflow:
    """Qwen-Image-Edit 2509 puts the face into each shot, Z-Image-Turbo turns the result into a photograph."""
    model = "Qwen-Image-Edit 2509"
    flow = _face() | {
        "10": _node(
            "UNETLoader", f"{model}: model", unet_name="qwen_image_edit_2509_fp8_e4m3fn_scaled.safetensors", weight_dtype="default"
        ),
        "11": _node(
            "LoraLoaderModelOnly",
            f"{model}: Lightning LoRA for 4 steps",
            model=["10", 0],
            lora_name="Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors",
            strength_model=1.0,
        ),
        "12": _node("ModelSamplingAuraFlow", f"{model}: sampling shift", model=["11", 0], shift=3.0),
        **_qwen_encoders(model),
        "20": _node("UNETLoader", "Z-Image-Turbo: model", unet_name="z_image_turbo_bf16.safetensors", weight_dtype="default"),
        "21": _node("ModelSamplingAuraFlow", "Z-Image-Turbo: sampling shift", model=["20", 0], shift=3.0),
        "22": _node(
            "CLIPLoader", "Z-Image-Turbo: text encoder", clip_name="qwen_3_4b.safetensors", type="lumina2", device="default"
        ),
        "23": _node("VAELoader", "Z-Image-Turbo: VAE", vae_name="ae.safetensors"),
        "25": _node(
            "PrimitiveStringMultiline", "The person, in words (edit here: every Z-Image prompt begins with it)", value=PERSON
        ),
        **_sizes(),
    }
    flow |= _previews("15", *(node for node, _, _ in SIZES.values()))
    for number, shot, title, n in _numbered(shots):
        flow[n[10]] = _qwen_prompt(f"{title}: what Qwen makes of the face reference", shot)
        flow[n[11]] = _preview(f"{title}: Qwen prompt, encoded before any sampling", n[10])
        flow[n[12]] = _qwen_sampler(f"{title}: Qwen sampler", 250900000 + number, "12", n[10], "15", shot)
        flow[n[13]] = _node("VAEDecode", f"{title}: Qwen image", samples=[n[12], 0], vae=["14", 0])
        flow[n[14]] = _save(f"{title}: save intermediate", n[13], "Qwen_Consistent_Char/CC")
        flow[n[15]] = _preview(f"{title}: Qwen image, made before Z-Image begins", n[13])
        flow[n[19]] = _node(
            "StringConcatenate",
            f"{title}: the person in this shot",
            string_a=["25", 0],
            string_b=f"{_scene(shot)} {TEXTURE}",
            delimiter=" ",
        )
        flow[n[20]] = _node("CLIPTextEncode", f"{title}: what Z-Image refines", clip=["22", 0], text=[n[19], 0])
        flow[n[21]] = _preview(f"{title}: Z-Image prompt, encoded before any sampling", n[20])
        flow[n[26]] = _node("ConditioningZeroOut", f"{title}: Z-Image negative prompt (not used at CFG 1)", conditioning=[n[20], 0])
        flow[n[22]] = _node("VAEEncode", f"{title}: Qwen image as Z-Image latent", pixels=[n[13], 0], vae=["23", 0])
        flow[n[23]] = _node(
            "KSampler",
            f"{title}: Z-Image sampler (denoise: higher is more texture, lower is more likeness)",
            model=["21", 0],
            seed=611250000 + number,
            steps=5,
            cfg=1.0,
            sampler_name="res_multistep",
            scheduler="simple",
            denoise=DENOISE[shot["framing"]],
            positive=[n[20], 0],
            negative=[n[26], 0],
            latent_image=[n[22], 0],
        )
        flow[n[24]] = _node("VAEDecode", f"{title}: final image", samples=[n[23], 0], vae=["23", 0])
        flow[n[25]] = _save(f"{title}: save final", n[24], "Qwen_Consistent_Char/Z_IMG_FINAL")
    return flow


def qwen_2511(shots: list[dict[str, str]]) -> Workflow:
    """Qwen-Image-Edit 2511 alone, which keeps a person's face better than 2509 does: one model, half the downloads."""
    model = "Qwen-Image-Edit 2511"
    flow = _face() | {
        "10": _node("UNETLoader", f"{model}: model", unet_name="qwen_image_edit_2511_fp8mixed.safetensors", weight_dtype="default"),
        "11": _node("ModelSamplingAuraFlow", f"{model}: sampling shift", model=["10", 0], shift=3.1),
        "12": _node(
            "LoraLoaderModelOnly",
            f"{model}: Lightning LoRA for 4 steps",
            model=["11", 0],
            lora_name="Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors",
            strength_model=1.0,
        ),
        **_qwen_encoders(model),
        "18": _reference_method(f"{model}: reference latents of the negative prompt", "15"),
        **_sizes(),
    }
    flow |= _previews("18", *(node for node, _, _ in SIZES.values()))
    for number, shot, title, n in _numbered(shots):
        flow[n[10]] = _qwen_prompt(f"{title}: what Qwen makes of the face reference", shot)
        flow[n[11]] = _reference_method(f"{title}: reference latents", n[10])
        flow[n[12]] = _preview(f"{title}: prompt, encoded before any sampling", n[11])
        flow[n[13]] = _qwen_sampler(f"{title}: sampler", 251100000 + number, "12", n[11], "18", shot)
        flow[n[14]] = _node("VAEDecode", f"{title}: image", samples=[n[13], 0], vae=["14", 0])
        flow[n[15]] = _save(f"{title}: save", n[14], "Qwen_2511_Char/FINAL")
    return flow


def _numbered(shots: list[dict[str, str]]) -> Iterator[tuple[int, dict[str, str], str, dict[int, str]]]:
    """The number of each shot, the shot, the beginning of its nodes' titles, and the id of its node with each offset."""
    for number, shot in enumerate(shots, 1):
        yield number, shot, f"Shot {number:02}, {shot['name']}", {offset: str(100 * number + offset) for offset in range(100)}


def _face() -> Workflow:
    """The face reference, scaled to the sizes that the model was trained on: encoders enlarge a small image blockwise."""
    return {
        "16": _node("LoadImage", "Face reference", image="face_reference.png"),
        "17": _node("FluxKontextImageScale", "Face reference, scaled to about one megapixel", image=["16", 0]),
    }


def _qwen_encoders(model: str) -> Workflow:
    return {
        "13": _node(
            "CLIPLoader",
            f"{model}: text and vision encoder",
            clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors",
            type="qwen_image",
            device="default",
        ),
        "14": _node("VAELoader", f"{model}: VAE", vae_name="qwen_image_vae.safetensors"),
        "15": _node(
            "TextEncodeQwenImageEditPlus",
            f"{model}: empty negative prompt (not used at CFG 1)",
            clip=["13", 0],
            prompt="",
            vae=["14", 0],
            image1=["17", 0],
        ),
    }


def _sizes() -> Workflow:
    return {
        node: _node(
            "EmptySD3LatentImage", f"Size: {name.replace('_', ' ')}, {width} x {height}", width=width, height=height, batch_size=1
        )
        for name, (node, width, height) in SIZES.items()
    }


def _previews(*nodes: str) -> Workflow:
    """A display node after each shared node, so that ComfyUI runs it before any sampling and each large model is loaded once."""
    return {str(int(node) + 30): _preview("Made before any sampling", node) for node in nodes}


def _qwen_prompt(title: str, shot: dict[str, str]) -> dict[str, Any]:
    prompt = f"{INSTRUCTION} {_scene(shot)} {IDENTITY}"
    return _node("TextEncodeQwenImageEditPlus", title, clip=["13", 0], prompt=prompt, vae=["14", 0], image1=["17", 0])


def _qwen_sampler(title: str, seed: int, model: str, positive: str, negative: str, shot: dict[str, str]) -> dict[str, Any]:
    return _node(
        "KSampler",
        title,
        model=[model, 0],
        seed=seed,
        steps=4,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
        positive=[positive, 0],
        negative=[negative, 0],
        latent_image=[SIZES[shot["size"]][0], 0],
    )


def _reference_method(title: str, conditioning: str) -> dict[str, Any]:
    return _node(
        "FluxKontextMultiReferenceLatentMethod",
        title,
        conditioning=[conditioning, 0],
        reference_latents_method="index_timestep_zero",
    )


def _preview(title: str, source: str) -> dict[str, Any]:
    return _node("PreviewAny", title, source=[source, 0])


def _save(title: str, images: str, prefix: str) -> dict[str, Any]:
    return _node("SaveImage", title, images=[images, 0], filename_prefix=prefix)


def _node(class_type: str, title: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}


def _scene(shot: dict[str, str]) -> str:
    return f"{shot['scene']}, wearing {shot['clothes']}, {shot['place']}."


def _write(path: Path, flow: Workflow) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [f'  "{node}": {json.dumps(flow[node], ensure_ascii=False)}' for node in sorted(flow, key=int)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
