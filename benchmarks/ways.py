"""`python -m benchmarks.ways MODEL [--only REGEX]`: the time of an optimizer step by every way of training, each against that of
the defaults in the same process. Needs CUDA. MODEL is a base model: a diffusers folder or a single file."""

import argparse
import copy
import functools
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from benchmarks.step import default_loss, random_batch
from benchmarks.train import require_gpu
from common.errors import run_main
from training.config import LoraSettings, OptimizerSettings
from training.data.batches import PRIOR_EVERY, Batch
from training.engine import choose_engine, prepare_unet, recompute_text_encoders
from training.engine.step import TrainStep
from training.method.adapters import inject
from training.method.lora_l2 import l2_of_changes
from training.method.optimizer_wrappers import make_optimizer
from training.models.base_model import find_base
from training.models.weights import TextEncoders, load_text_encoders, load_unet
from training.system.device import choose_precision, release_memory

STEPS = 20


@dataclass(frozen=True)
class Way:
    """What differs from the defaults."""

    name: str
    lora: dict[str, object] = field(default_factory=dict)
    optimizer: dict[str, object] = field(default_factory=dict)
    loss: dict[str, object] = field(default_factory=dict)
    batch: int = 4
    checkpointing: bool = False
    in_int8: bool = False
    has_prior: bool = False
    pull: float = 0.0
    engine: Literal["auto", "plain"] = "auto"


SMALL_CARD = {"batch": 1, "checkpointing": True, "in_int8": True}
WAYS = (
    Way("defaults"),
    Way("prodigy", optimizer={"optimizer": "prodigy", "learning_rate": 1.0}),
    Way("average", optimizer={"ema_decay": 0.999}),
    Way("LoRA+", optimizer={"loraplus_ratio": 16.0}),
    Way("pull", pull=1e-4),
    Way("prior", has_prior=True),
    Way("huber_snr, debiased", loss={"loss": "huber_snr", "weighting": "debiased"}),
    Way("DoRA", lora={"lora_type": "dora"}),
    Way("DoRA, plain engine", lora={"lora_type": "dora"}, engine="plain"),
    Way("convolutions, rank 16", lora={"lora_conv_rank": 16}),
    Way("DoRA and convolutions, rank 16", lora={"lora_type": "dora", "lora_conv_rank": 16}),
    Way("DoRA, dropout", lora={"lora_type": "dora", "lora_dropout": 0.1}),
    Way("one image, checkpointing, DoRA", lora={"lora_type": "dora"}, batch=1, checkpointing=True),
    Way("one image, checkpointing, convolutions, int8", lora={"lora_conv_rank": 16, "lora_rank": 16}, **SMALL_CARD),
    Way("LoHa", lora={"lora_type": "loha", "lora_rank": 8}),
    Way("LoKr", lora={"lora_type": "lokr"}),
    Way("dropout", lora={"lora_dropout": 0.1}),
    Way("text encoders, 3 chunks", lora={"train_text_encoders": True}),
    Way("text encoders, 3 chunks, checkpointing", lora={"train_text_encoders": True}, checkpointing=True),
    Way("one image", batch=1),
    Way("one image, checkpointing", batch=1, checkpointing=True),
    Way("one image, checkpointing, rank 16", lora={"lora_rank": 16}, batch=1, checkpointing=True),
    Way("one image, checkpointing, rank 16, int8", lora={"lora_rank": 16}, **SMALL_CARD),
    Way("adamw8bit", optimizer={"optimizer": "adamw8bit"}),
    Way("schedulefree", optimizer={"optimizer": "schedulefree"}),
    Way("adafactor", optimizer={"optimizer": "adafactor"}),
    Way(
        "one image, checkpointing, rank 16, int8, adamw8bit",
        lora={"lora_rank": 16},
        optimizer={"optimizer": "adamw8bit"},
        **SMALL_CARD,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ways", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", default="", help="regular expression: measure only these ways, and the defaults")
    parser.add_argument("--latents", type=int, default=128, help="height and width; 128 is 1024 px")
    options = parser.parse_args()
    base = find_base(str(options.model), options.model.parent)
    require_gpu()
    precision = choose_precision("bf16")
    load = functools.cache(lambda in_int8: load_unet(base, torch.device("cpu"), precision.dtype, in_int8=in_int8))
    print("| way | engine | step, ms | of the defaults' | torch reserved, GiB |\n|---|---|---|---|---|", flush=True)
    first = None
    for way in WAYS:
        if way is not WAYS[0] and not re.search(options.only, way.name):
            continue
        of_text = load_text_encoders(base, precision.device, precision.dtype) if way.lora.get("train_text_encoders") else None
        step, engine = prepared(copy.deepcopy(load(way.in_int8)).to(precision.device), of_text, way)
        seconds = timed(step, batches_of(step.unet, way, options.latents), way)
        first = first or seconds
        reserved = torch.cuda.max_memory_reserved() / 2**30
        print(f"| {way.name} | {engine} | {1e3 * seconds:.1f} | {seconds / first:.3f} | {reserved:.1f} |", flush=True)
        del step, of_text
        release_memory()
        torch.cuda.reset_peak_memory_stats()


def prepared(unet: UNet2DConditionModel, text_encoders: TextEncoders | None, way: Way) -> tuple[TrainStep, str]:
    """The step of this way, and the engine that computes it."""
    settings, precision = LoraSettings(**way.lora), choose_precision("bf16")
    lora = inject(unet, settings, 0, text_encoders or ())
    engine, _ = choose_engine(way.engine, settings)
    optimizer = make_optimizer(lora, OptimizerSettings(**way.optimizer))
    sync = prepare_unet(engine, unet, lora, precision.device, gradient_checkpointing=way.checkpointing)
    if text_encoders and way.checkpointing:
        recompute_text_encoders(text_encoders, lora)
    add_gradient = l2_of_changes(lora, way.pull) if way.pull else None
    config = replace(default_loss(precision.device), **way.loss)
    how = {"text_encoders": text_encoders, "add_gradient": add_gradient, "sync_compute_weights": sync}
    return TrainStep(unet, lora, optimizer, config, precision, max_grad_norm=1.0, **how), engine


def batches_of(unet: UNet2DConditionModel, way: Way, latents: int) -> list[Batch]:
    """Batches that are trained on in turn: one, or with a prior as many as it takes until its rows are the same again."""
    batch = random_batch(unet, way.batch, latents)
    if way.lora.get("train_text_encoders"):
        tokens = torch.randint(1, 49000, (way.batch, 2, 3, 77))
        tokens[..., -1] = 49407  # where the pooled embedding is read
        batch = replace(batch, hidden=torch.empty(0), pooled=torch.empty(0), tokens=tokens)
    if not way.has_prior:
        return [batch.pinned()]
    batches = []
    for first in range(0, way.batch * PRIOR_EVERY, way.batch):
        if rows := [row for row in range(way.batch) if (first + row) % PRIOR_EVERY == 0]:
            prior = {"prior_rows": torch.tensor(rows), "prior_hidden": batch.hidden[rows], "prior_pooled": batch.pooled[rows]}
            prior["prior_weights"] = torch.full((len(rows),), 1 / way.batch)
        batches.append(replace(batch, **(prior if rows else {})).pinned())
    return batches


def timed(step: TrainStep, batches: list[Batch], way: Way) -> float:
    """Seconds of a step as the loop takes them, each read while the next one runs."""
    rate = OptimizerSettings(**way.optimizer).learning_rate
    for number in range(max(4, 2 * len(batches))):
        step([batches[number % len(batches)]], rate)
    started, read = time.monotonic(), None
    for number in range(STEPS):
        begun = step.begin([batches[number % len(batches)]], rate)
        if read:
            read()
        read = begun
    read()
    return (time.monotonic() - started) / STEPS


if __name__ == "__main__":
    sys.exit(run_main("benchmarks.ways", main))
