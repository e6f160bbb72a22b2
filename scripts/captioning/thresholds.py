"""From which probability on a tag counts: a number, the model's own known point, or a cut made for each picture. Pure."""

import numpy as np

from errors import SettingsError

# Where precision equals recall on the model's validation set, as its author states it.
KNOWN_POINTS = {
    "wd-vit-tagger-v3": 0.2614,
    "wd-swinv2-tagger-v3": 0.2653,
    "wd-convnext-tagger-v3": 0.2682,
    "wd-eva02-large-tagger-v3": 0.5296,
    "wd-v1-4-vit-tagger-v2": 0.3537,
    "wd-v1-4-convnext-tagger-v2": 0.3685,
    "wd-v1-4-convnextv2-tagger-v2": 0.3710,
    "wd-v1-4-swinv2-tagger-v2": 0.3771,
    "wd-v1-4-moat-tagger-v2": 0.3771,
    "idolsankaku-eva02-large-tagger-v1": 0.4985,
}
MCUT = "mcut"


def known_point(model: str) -> float:
    """The threshold that "auto" stands for; `model` is CAPTION_MODEL. Raises SettingsError for a model that has none."""
    name = model.rstrip("/").rpartition("/")[2]
    if name not in KNOWN_POINTS:
        raise SettingsError(
            f"caption_threshold: auto knows no point for {model}, only for {', '.join(KNOWN_POINTS)}; set a number, or mcut"
        )
    return KNOWN_POINTS[name]


def mcut(probabilities: np.ndarray) -> float:
    """The middle of the largest gap between neighbours among the sorted `probabilities` (Largeron et al. 2012, MCut)."""
    falling = np.sort(probabilities)[::-1]
    if len(falling) < 2:
        return 0.0
    widest = int(np.argmax(falling[:-1] - falling[1:]))
    return float(falling[widest] + falling[widest + 1]) / 2
