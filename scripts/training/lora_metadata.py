"""What the header of a LoRA file says: what it is, and how it was made. Names as kohya's trainer and modelspec write them."""

import base64
import io
import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from common.settings import VERSION
from training.config import LoraSettings, TrainSettings
from training.job import TrainingJob
from training.method.diffusion import LOSS_METADATA
from training.method.optimizers import OPTIMIZERS
from training.plan import Plan, short_hash

_MAX_TAGS_BYTES = 10_000_000
"""Of the tags of all captions in the header of a LoRA. safetensors reads headers of up to 100 MB."""
_THUMBNAIL_PX = 256
"""The side that modelspec recommends."""


def lora_metadata(job: TrainingJob, epochs: int) -> dict[str, str]:
    """What A1111, Forge, ComfyUI and model managers read in the header of the LoRA after `epochs` epochs; no paths."""
    settings, plan, name = job.settings, job.plan, job.outputs.name
    now, resolution = datetime.now(UTC), settings.data.resolutions[0]
    pieces = [piece for example in plan.images for caption in example.captions for piece in caption.split(",")]
    tags = Counter(tag for tag in map(str.strip, pieces) if tag)
    is_v = plan.schedule.prediction_type == "v_prediction"
    trigger = ", ".join(plan.triggers)
    description = f"Trained on {len(plan.images)} images for {epochs} epochs with LoRACat {VERSION}. Write {trigger} in the prompt."
    module, arguments = network_of(settings.lora)
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": module,
        "ss_network_dim": str(settings.lora.lora_rank),
        "ss_network_alpha": str(settings.lora.alpha),
        "ss_network_dropout": str(settings.lora.lora_dropout or None),
        "ss_network_args": json.dumps(arguments),
        "ss_output_name": name,
        "ss_sd_model_name": job.base.name,
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_num_train_images": str(len(plan.images)),
        "ss_num_epochs": str(epochs),
        "ss_epoch": str(epochs),
        "ss_steps": str(sum(step.epoch < epochs for step in plan.order)),
        "ss_max_train_steps": str(len(plan.order)),
        "ss_batch_size_per_device": str(settings.run.train_batch_size),
        "ss_gradient_accumulation_steps": str(settings.run.gradient_accumulation_steps),
        "ss_total_batch_size": str(plan.global_batch),
        "ss_gradient_checkpointing": str(settings.model.gradient_checkpointing),
        "ss_mixed_precision": job.precision.name,
        "ss_learning_rate": str(settings.optimizer.learning_rate),
        "ss_unet_lr": str(settings.optimizer.learning_rate),
        **({"ss_text_encoder_lr": str(settings.optimizer.text_encoder_lr)} if settings.lora.train_text_encoders else {}),
        **_method_metadata(settings, plan),
        "ss_zero_terminal_snr": str(plan.schedule.zero_terminal_snr),
        "ss_caption_dropout_rate": str(settings.data.caption_dropout),
        "ss_shuffle_caption": str(settings.data.caption_shuffle),
        "ss_cache_latents": "True",
        "ss_seed": str(settings.run.train_seed),
        "ss_training_comment": settings.saving.lora_description or f"LoRACat {VERSION}",
        "ss_tag_frequency": json.dumps({"dataset": _most_frequent(tags)}, ensure_ascii=False),
        "ss_training_finished_at": str(now.timestamp()),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.description": settings.saving.lora_description or description,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.date": now.isoformat(timespec="seconds"),
        "modelspec.prediction_type": "v" if is_v else "epsilon",
        "modelspec.trigger_phrase": trigger,
        "loracat_version": VERSION,
        "loracat_fingerprint": short_hash(job.identity.fingerprint),
        **({"modelspec.author": settings.saving.lora_author} if settings.saving.lora_author else {}),
        **({"ss_v_parameterization": "True"} if is_v else {}),
        **(
            {
                "ss_num_reg_images": str(len({each.path for each in plan.regularization})),
                "ss_prior_loss_weight": str(plan.prior_weight),
            }
            if plan.regularization
            else {}
        ),
    }


def _method_metadata(settings: TrainSettings, plan: Plan) -> dict[str, str]:
    """Optimizer and objective in the words of kohya's scripts, where these have one."""
    optimizer = settings.optimizer
    return {
        "ss_optimizer": OPTIMIZERS[optimizer.optimizer].label,
        "ss_lr_scheduler": optimizer.lr_scheduler,
        "ss_lr_warmup_steps": str(plan.warmup_steps),
        "ss_max_grad_norm": str(optimizer.max_grad_norm),
        **LOSS_METADATA[settings.objective.loss],
        "ss_min_snr_gamma": str(plan.min_snr_gamma or None),
        "ss_debiased_estimation": str(settings.objective.loss_weighting == "debiased"),
        "ss_noise_offset": str(plan.noise_offset or None),
    }


def network_of(lora: LoraSettings) -> tuple[str, dict[str, str]]:
    """`ss_network_module` and `ss_network_args`, as kohya's trainer writes them for a file of this kind: of its own network if that
    can have made it, else of LyCORIS."""
    arguments = {}
    if lora.lora_conv_rank:
        conv_alpha = lora.lora_conv_rank if lora.lora_alpha == "auto" else lora.lora_alpha
        arguments = {"conv_dim": str(lora.lora_conv_rank), "conv_alpha": str(float(conv_alpha))}
    if lora.lora_rank_pattern.split():
        arguments["rank_pattern"] = " ".join(lora.lora_rank_pattern.split())
    if lora.lora_type == "lora" and not lora.lora_rslora:
        return "networks.lora", arguments
    arguments["algo"] = "lora" if lora.lora_type == "dora" else lora.lora_type
    if lora.lora_type == "dora":
        arguments["dora_wd"] = "True"
    if lora.lora_type == "lokr":
        arguments["factor"] = str(-1 if lora.lokr_factor == "auto" else lora.lokr_factor)
    if lora.lora_rslora:
        arguments["rs_lora"] = "True"
    return "lycoris.kohya", arguments


def thumbnail(image: Path | None) -> dict[str, str]:
    """The sample `image` as modelspec's thumbnail, a JPEG of at most 256 x 256 in a data URI; nothing without an image."""
    if image is None or not image.exists():
        return {}
    content = io.BytesIO()
    with Image.open(image) as opened:
        small = opened.convert("RGB")
        small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.LANCZOS)
        small.save(content, "jpeg", quality=85)
    return {"modelspec.thumbnail": f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"}


def _most_frequent(tags: Counter[str]) -> dict[str, int]:
    """The tags and their counts, the most frequent first, up to _MAX_TAGS_BYTES: safetensors limits the size of a header."""
    kept, size_bytes = {}, 0
    for tag, count in tags.most_common():
        size_bytes += len(json.dumps(tag)) + 10
        if size_bytes > _MAX_TAGS_BYTES:
            break
        kept[tag] = count
    return kept
