"""Which save of a run `-best`, `-recommended` and early stopping pick, to be compared with what the judge says of every save.

The face models that the product has see no face in drawings, so the judge's reader scores the product's own sample images in their
place; the rules are the product's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.world.measures import Judge
from common.files import parse_json, read_file, read_json_lines
from common.weights import read_header
from training.callbacks.recommendation import Save, choose
from training.loop import breaks_down

if TYPE_CHECKING:
    from benchmarks.world.runs import Run

PATIENCE = (2, 3, 5)
"""Values of EARLY_STOP_PATIENCE."""


def picks_of(run: Run, judge: Judge) -> dict[str, object]:
    """`picks`: the epochs of what each rule picks, as far as the run has what it needs; `validation`: smoothed loss by epochs."""
    layout, picks = run.layout, {}
    losses = validation_losses(layout.metrics)
    if layout.best.exists():
        picks["best"] = int(read_header(layout.best).metadata["ss_epoch"])
    for patience in PATIENCE if losses else ():
        picks[f"early stop {patience}"] = stopped_after(losses, patience)
    if layout.samples_record.exists():
        saves = sampled_saves(run, judge)
        chosen, reason = choose(saves, losses=losses)
        without_likeness, _ = choose([replace(save, scores=()) for save in saves], losses=losses)
        picks |= {"recommended": chosen.epochs, "recommended without likeness": without_likeness.epochs}
        picks |= {"likeliest": max(saves, key=lambda save: np.mean(save.scores)).epochs}
        return {"picks": picks, "validation": losses, "reason": reason, "sampled": [vars(save) for save in saves]}
    return {"picks": picks, "validation": losses} if picks else {}


def validation_losses(metrics: Path) -> dict[int, float]:
    """Epochs -> smoothed validation loss."""
    lines = read_json_lines(metrics) if metrics.exists() else []
    return {line["epoch"] + 1: line["validation_loss_smoothed"] for line in lines if "validation_loss_smoothed" in line}


def stopped_after(losses: Mapping[int, float], patience: int) -> int:
    """The epochs after which a run ends early, by the product's rule for smoothed losses."""
    values = list(losses.values())
    ends = (epochs for number, epochs in enumerate(losses, start=1) if breaks_down(values[:number], patience))
    return next(ends, max(losses))


def sampled_saves(run: Run, judge: Judge) -> list[Save]:
    """The rows of the product's sample images as its rule sees them."""
    layout = run.layout
    record = parse_json(read_file(layout.samples_record))
    asks = [bool(prompt["subject"]) for prompt in record["prompts"]]
    base = record["rows"][0]
    saves = []
    for row in record["rows"][1:]:
        paths = [layout.samples / name for name, asked in zip(row["images"], asks, strict=True) if asked]
        pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
        scores = judge.likeness_of(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
        pairs = [pair for *pair, asked in zip(base["images"], row["images"], asks, strict=True) if not asked]
        distances = [_distance(*((layout.sample_latents / name).with_suffix(".safetensors") for name in pair)) for pair in pairs]
        distance = round(float(np.mean(distances)), 4) if distances else None
        scored = tuple(round(score, 4) for score in scores)
        saves.append(Save(row["file"] or layout.lora.name, row["epochs"], scored, distance))
    return saves


def _distance(before: Path, after: Path) -> float:
    first, second = (load_file(path)["latents"].double() for path in (before, after))
    return (second - first).square().mean().sqrt().item()
