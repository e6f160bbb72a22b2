"""A workflow for ComfyUI, in its API format, that renders an image with a LoRA."""

from typing import Any

from training.models.sdxl import Schedule

CHECKPOINTS = {"stable-diffusion-xl-base-1.0": "sd_xl_base_1.0.safetensors"}
"""Folders of diffusers -> the name of the single file with the same weights."""
STEPS = 30


def comfyui_workflow(
    lora: str, strength: float, base: str, schedule: Schedule, prompt: str, prefix: str, size: int, guidance: float, seed: int
) -> dict[str, dict[str, Any]]:
    """The nodes by id. `base`: the name of the base model, without a suffix; `prefix`: of the images that are saved."""
    checkpoint = CHECKPOINTS.get(base, f"{base}.safetensors")
    strengths = {"strength_model": strength, "strength_clip": strength}
    nodes = {
        "1": _node("CheckpointLoaderSimple", "Base model: choose the checkpoint that was trained on", ckpt_name=checkpoint),
        "2": _node("LoraLoader", "LoRA", model=["1", 0], clip=["1", 1], lora_name=lora, **strengths),
        "3": _node("CLIPTextEncode", "Prompt: keep the trigger word", clip=["2", 1], text=prompt),
        "4": _node("CLIPTextEncode", "Negative prompt", clip=["2", 1], text=""),
        "5": _node("EmptyLatentImage", "Size", width=size, height=size, batch_size=1),
        "6": _node(
            "KSampler",
            "Sampler",
            model=["2", 0],
            positive=["3", 0],
            negative=["4", 0],
            latent_image=["5", 0],
            seed=seed,
            steps=STEPS,
            cfg=guidance,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "7": _node("VAEDecode", "Decode", samples=["6", 0], vae=["1", 2]),
        "8": _node("SaveImage", "Save", images=["7", 0], filename_prefix=prefix),
    }
    if schedule.prediction_type == "v_prediction" or schedule.zero_terminal_snr:
        kind = "v_prediction" if schedule.prediction_type == "v_prediction" else "eps"
        title = "The schedule that the base model was trained with"
        nodes["9"] = _node("ModelSamplingDiscrete", title, model=["2", 0], sampling=kind, zsnr=schedule.zero_terminal_snr)
        nodes["6"]["inputs"]["model"] = ["9", 0]
    return nodes


def _node(kind: str, title: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
