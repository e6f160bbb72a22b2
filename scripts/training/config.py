"""The training settings as types: `[train]` and the tables inside it. It imports no library, so that settings are read at once."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.project import SharedDataSettings, SharedModelSettings
from common.settings import address_problem, setting

OnOffAuto = bool | Literal["auto"]
RankRule = tuple[re.Pattern[str], int, float | None]
"""Layers whose names contain the expression have this rank, and this alpha; None: the usual one. Rank 0: they are left out."""
PRODIGY_LEAST_RATE = 0.01
"""A smaller factor is a rate that was meant for AdamW."""


@dataclass(frozen=True)
class ModelSettings(SharedModelSettings):
    """`[train.model]`: the base that is adapted."""

    prediction_type: Literal["auto", "epsilon", "v_prediction"] = setting("auto", role="result")
    zero_terminal_snr: OnOffAuto = setting("auto", role="result")
    mixed_precision: Literal["bf16", "fp16", "no"] = setting("bf16", role="result")
    gradient_checkpointing: OnOffAuto = setting("auto", role="runtime")
    base_quantization: Literal["none", "int8", "auto"] = setting("none", role="result", before="none")
    """"int8" holds the frozen weights of the UNet in 8 bits; "auto": only where one image would not fit otherwise."""


@dataclass(frozen=True)
class DataSettings(SharedDataSettings):
    """`[train.data]`: how images and captions become examples."""

    bucket_step: int = setting(64, at_least=8, at_most=256, role="result")
    """Pixels: sides of buckets are multiples of this. The smallest image that is taken has 256 px."""
    bucket_max_side: int = setting(2048, at_least=64, at_most=8192, role="result")
    """Pixels: the longest side of a bucket."""
    caption_dropout: float = setting(0.05, at_least=0, at_most=1, role="result")
    """Share of the samples that see the empty caption."""
    caption_shuffle: bool = setting(True, role="result")
    caption_variants: int = setting(8, at_least=1, at_most=64, role="result")
    """How many shuffles of a caption are encoded."""
    prior_weight: float = setting(1.0, at_least=0, at_most=100, role="result", before=1.0)
    """Of regularization images in the loss, beside 1 of the others; 0: they are not used."""
    dataloader_num_workers: int = setting(4, at_least=0, at_most=64, role="runtime")
    skip_flagged: bool = setting(False, role="runtime")
    """Leave out the images that the caption stage's audit flagged."""
    flip: bool = setting(False, role="result", before=False)
    """Half of the samples see the mirror image."""
    mask_weight: float = setting(0.1, at_least=0, at_most=1, role="result", before=0.1)
    """Of the areas outside an image's mask in the loss."""

    def validate(self) -> Iterator[str]:
        if any(each % self.bucket_step for each in self.resolutions) or self.bucket_step % 8:
            yield "resolution must be a multiple of bucket_step, and bucket_step of 8"
        if self.bucket_max_side < self.resolutions[0]:
            yield "bucket_max_side must not be smaller than resolution"


@dataclass(frozen=True)
class LoraSettings:
    """`[train.lora]`: the adapter."""

    lora_rank: int = setting(32, at_least=1, at_most=1024, role="result")
    lora_alpha: float | Literal["auto"] = setting("auto", at_least=0.001, at_most=60000, role="result")
    """The adapter is scaled by alpha / rank; "auto": the rank. The file holds it in fp16."""
    lora_targets: Literal["all", "attention"] = setting("all", role="result")
    lora_type: Literal["lora", "dora", "loha", "lokr"] = setting("lora", role="result", before="lora")
    """"dora" also trains the norm of each row of the adapted weights; "loha" and "lokr" are products of other kinds."""
    train_text_encoders: bool = setting(False, role="result", before=False)
    """Adapt both text encoders as well; captions are then encoded in each step."""
    lora_conv_rank: int = setting(0, at_least=0, at_most=1024, role="result", before=0)
    """Rank of the 3x3 convolutions of ResNets and samplers; 0: these are not adapted."""
    lora_rank_pattern: str = setting("", role="result", before="")
    """`EXPRESSION=RANK` or `EXPRESSION=RANK:ALPHA`, separated by spaces; rank 0 leaves a layer out."""
    lora_rslora: bool = setting(False, role="result", before=False)
    """Scale by alpha / sqrt(rank)."""
    lora_dropout: float = setting(0.0, at_least=0, at_most=0.9, role="result", before=0.0)
    """Share of an adapter's inputs that a step leaves out."""
    init_lora: Path | None = setting(None, role="runtime")
    """A LoRA file to begin from; its content is part of the result."""
    init_lora_resize: bool = setting(False, role="runtime")
    """Give it the rank of this run if it has another one."""
    lokr_factor: int | Literal["auto"] = setting("auto", at_least=2, at_most=1280, role="result", before="auto")
    """Size of LoKr's first factor; "auto": near the square root of the layer's."""

    @property
    def alpha(self) -> float:
        """The value of `lora_alpha`, if it is "auto" as well."""
        return float(self.lora_rank) if self.lora_alpha == "auto" else self.lora_alpha

    def scale(self, rank: int, alpha: float) -> float:
        """What the change of a layer is multiplied by."""
        return alpha / (math.sqrt(rank) if self.lora_rslora else rank)

    def describe(self) -> str:
        """Kind, rank, alpha and scale, in words."""
        origin = ", auto" if self.lora_alpha == "auto" else ""
        kind = "" if self.lora_type == "lora" else f"{self.lora_type}, "
        convolutions = f", convolutions of rank {self.lora_conv_rank}" if self.lora_conv_rank else ""
        pattern = f", except by {self.lora_rank_pattern!r}" if self.lora_rank_pattern.split() else ""
        scale = f"scale {self.scale(self.lora_rank, self.alpha):g}{origin}"
        texts = ", in the text encoders too" if self.train_text_encoders else ""
        return f"{kind}rank {self.lora_rank}, alpha {self.alpha:g} ({scale}){convolutions}{pattern}{texts}"

    @property
    def rank_rules(self) -> list[RankRule]:
        """`lora_rank_pattern`, read. Raises ValueError."""
        return [_rank_rule(item) for item in self.lora_rank_pattern.split()]

    def validate(self) -> Iterator[str]:
        for item in self.lora_rank_pattern.split():
            try:
                _rank_rule(item)
            except ValueError as error:
                yield f"lora_rank_pattern: {error}"
        if self.lora_dropout and self.lora_type in ("loha", "lokr"):
            yield f"lora_dropout: LORA_TYPE={self.lora_type} has no dropout; set LORA_DROPOUT=0, or LORA_TYPE=lora"
        if self.init_lora_resize and self.init_lora is None:
            yield "init_lora_resize is for INIT_LORA, which is not set; set INIT_LORA_RESIZE=false"
        if self.lokr_factor != "auto" and self.lora_type != "lokr":
            yield f"lokr_factor is for LORA_TYPE=lokr (is {self.lora_type}); set LOKR_FACTOR=auto"


def _rank_rule(item: str) -> RankRule:
    """One item of `lora_rank_pattern`. Raises ValueError."""
    expression, _, numbers = item.rpartition("=")
    found = re.fullmatch(r"(\d{1,4})(?::(\d+(?:\.\d*)?))?", numbers)
    rank, alpha = (int(found[1]), float(found[2]) if found[2] else None) if found else (-1, None)
    if not expression or not 0 <= rank <= 1024 or (alpha is not None and not 0.001 <= alpha <= 60000):
        raise ValueError(f"{item!r} must be EXPRESSION=RANK or EXPRESSION=RANK:ALPHA, such as attn2=64 or ff=16:8")
    try:
        return re.compile(expression), rank, alpha
    except re.error as error:
        raise ValueError(f"{expression!r} is not a regular expression ({error})") from None


@dataclass(frozen=True)
class ObjectiveSettings:
    """`[train.objective]`: what is minimised."""

    loss: Literal["mse", "huber", "huber_snr", "l1"] = setting("mse", role="result", before="mse")
    """"huber_snr": Huber's threshold falls as noise rises."""
    loss_weighting: Literal["min_snr", "debiased", "none"] = setting("min_snr", role="result", before="min_snr")
    """How much each noise level counts."""
    min_snr_gamma: float | Literal["auto"] = setting("auto", at_least=0, role="result")
    """0 is off; "auto": 5, off for v-prediction and zero-terminal-SNR bases."""
    noise_offset: float | Literal["auto"] = setting("auto", at_least=0, at_most=1, role="result")
    """0 is off; "auto": 0.0357, off for v-prediction and zero-terminal-SNR bases."""
    timestep_min: int = setting(0, at_least=0, at_most=9999, role="result", before=0)
    """The first timestep that is trained; high ones are noisy."""
    timestep_max: int = setting(0, at_least=0, at_most=10000, role="result", before=0)
    """Timesteps below this are trained; 0: up to the last one."""
    timestep_sampling: Literal["uniform", "logit_normal"] = setting("uniform", role="result", before="uniform")
    """How often each timestep is drawn."""
    timestep_shift: float = setting(1.0, at_least=0.01, at_most=100, role="result", before=1.0)
    """Above 1, noisy timesteps are drawn more often; below 1, less often."""
    prior_preservation: float = setting(0.0, at_least=0, at_most=100, role="result", before=0.0)
    """Weight of the loss that keeps the base model's answers to captions with `subject_class` for the trigger word; 0 is off."""
    lora_l2: float = setting(0.0, at_least=0, at_most=1, role="result", before=0.0)
    """Weight of the sum of the squares of all that the LoRA adds to the base model's weights; 0 is off."""

    def validate(self) -> Iterator[str]:
        if self.loss_weighting != "min_snr" and self.min_snr_gamma not in ("auto", 0):
            remedy = "set MIN_SNR_GAMMA=auto, or LOSS_WEIGHTING=min_snr"
            yield f"min_snr_gamma: {self.min_snr_gamma:g} has no effect with LOSS_WEIGHTING={self.loss_weighting}; {remedy}"
        if 0 < self.timestep_max <= self.timestep_min:
            yield f"timestep_max: {self.timestep_max} must be above timestep_min, which is {self.timestep_min}; 0 is no limit"


_OF_ONE_SCHEDULER = {
    "lr_cycles": (3, "cosine_with_restarts"),
    "lr_power": (2.0, "polynomial"),
    "lr_decay": (0.2, "warmup_stable_decay"),
}
"""Settings that only one scheduler reads, with their defaults."""


@dataclass(frozen=True)
class OptimizerSettings:
    """`[train.optimizer]`: the optimizer and its learning rate."""

    optimizer: Literal["adamw", "adamw8bit", "prodigy", "schedulefree", "adafactor"] = setting(
        "adamw", role="result", before="adamw"
    )
    learning_rate: float = setting(1e-4, above=0, at_most=1, role="result")
    text_encoder_lr: float = setting(1e-5, above=0, at_most=1, role="result", before=1e-5)
    """Of the text encoders, if they are trained; it rises and falls as `learning_rate`."""
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "warmup_stable_decay"] = setting(
        "constant", role="result"
    )
    lr_warmup: float = setting(0.05, at_least=0, at_most=1, role="result")
    """Share of the optimizer steps over which the rate rises from 0."""
    lr_cycles: int = setting(3, at_least=1, at_most=1000, role="result", before=3)
    """How often cosine_with_restarts falls."""
    lr_power: float = setting(2.0, at_least=0.01, at_most=100, role="result", before=2.0)
    """Of polynomial."""
    lr_decay: float = setting(0.2, above=0, at_most=1, role="result", before=0.2)
    """Share of the optimizer steps at the end over which warmup_stable_decay falls."""
    loraplus_ratio: float = setting(1.0, at_least=1, at_most=1000, role="result", before=1.0)
    """The rate of a LoRA's `up` is so many times that of its `down`."""
    weight_decay: float = setting(0.01, at_least=0, at_most=1, role="result")
    adam_beta1: float = setting(0.9, at_least=0, at_most=0.99999, role="result")
    adam_beta2: float = setting(0.999, at_least=0, at_most=0.9999999, role="result")
    adam_epsilon: float = setting(1e-8, above=0, at_most=1, role="result")
    max_grad_norm: float = setting(1.0, at_least=0, role="result")
    """The gradient is scaled down to this norm; 0 is off."""
    ema_decay: float = setting(0.0, at_least=0, at_most=0.999999, role="result", before=0.0)
    """Decay of an average of the weights, which is validated, sampled and saved; 0 is off."""

    def validate(self) -> Iterator[str]:
        if self.optimizer == "prodigy" and self.learning_rate < PRODIGY_LEAST_RATE:
            yield f"learning_rate is a factor of the rate that prodigy finds: set LEARNING_RATE=1 (is {self.learning_rate})"
        for name, (default, scheduler) in _OF_ONE_SCHEDULER.items():
            if getattr(self, name) != default and self.lr_scheduler != scheduler:
                remedy = f"set LR_SCHEDULER={scheduler}, or {name.upper()}={default:g}"
                yield f"{name}: {getattr(self, name):g} has no effect with LR_SCHEDULER={self.lr_scheduler}; {remedy}"
        if self.optimizer == "adafactor":
            for name, default in {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}.items():
                if getattr(self, name) != default:
                    yield f"{name}: has no effect with OPTIMIZER=adafactor; set {name.upper()}={default:g}"
        if self.lr_scheduler == "warmup_stable_decay" and self.lr_warmup + self.lr_decay > 1:
            yield f"lr_decay: {self.lr_decay:g} and lr_warmup, {self.lr_warmup:g}, are more than the whole run; lower one of them"
        if self.loraplus_ratio != 1 and self.optimizer not in ("adamw", "adamw8bit"):
            remedy = "set LORAPLUS_RATIO=1, or OPTIMIZER=adamw"
            yield f"loraplus_ratio: OPTIMIZER={self.optimizer} has one rate for all weights; {remedy}"
        if self.optimizer == "schedulefree":
            averages = {"lr_scheduler": "constant", "ema_decay": 0}
            for name in (name for name, value in averages.items() if getattr(self, name) != value):
                yield f"{name}: OPTIMIZER=schedulefree averages the weights instead; set {name.upper()}={averages[name]}"
            if self.adam_beta1 == 0:
                yield "adam_beta1: OPTIMIZER=schedulefree needs more than 0; set ADAM_BETA1=0.9"


@dataclass(frozen=True)
class RunSettings:
    """`[train.run]`: how long, and how much at once."""

    train_batch_size: int | Literal["auto"] = setting(4, at_least=1, at_most=4096, role="runtime")
    """Images at once; "auto": as many as fit into the memory, or as the saved run can take."""
    gradient_accumulation_steps: int = setting(1, at_least=1, at_most=4096, role="runtime")
    num_train_epochs: int | Literal["auto"] = setting(20, at_least=1, at_most=100000, role="result")
    """"auto": as many as give the training samples that a likeness needs."""
    num_train_steps: int = setting(0, at_least=0, at_most=1000000, role="result", before=0)
    """Optimizer steps after which the run ends, whatever the number of epochs; 0: as many as the epochs have."""
    engine: Literal["auto", "fast", "plain"] = setting("auto", role="runtime")
    """"plain": PEFT's own layers and autograd, the reference; "fast": fused kernels, refused where they do not support the
    request; "auto": fast where it supports the request, else plain."""
    train_seed: int = setting(0, at_least=0, at_most=2**63 - 1, role="result")
    deterministic: bool = setting(False, role="runtime")
    """Only algorithms that give the same bits each time on the same GPU."""
    memory_floor_gib: float | Literal["auto"] = setting("auto", at_least=0, at_most=4096, role="runtime")
    """GiB of memory below which the run saves its state and ends; 0: no guard; "auto": a sixteenth of the memory where CPU
    and GPU share it and on a CPU, none elsewhere."""


@dataclass(frozen=True)
class ProcessSettings:
    """`[train.processes]`: one process per GPU, on one machine or several."""

    num_processes: int = setting(1, at_least=1, at_most=64, role="runtime")
    """On each machine."""
    num_machines: int = setting(1, at_least=1, at_most=64, role="runtime")
    machine_rank: int = setting(0, at_least=0, at_most=63, role="runtime")
    """Which of the machines this is; 0 decides and writes."""
    main_process_ip: str = setting("127.0.0.1", role="runtime")
    """Address of machine 0."""
    main_process_port: int = setting(0, at_least=0, at_most=65535, role="runtime")
    """0: any free port, which only one machine can do."""

    def validate(self) -> Iterator[str]:
        if self.machine_rank >= self.num_machines:
            yield "machine_rank must be below num_machines"
        if self.num_machines > 1 and (self.main_process_port == 0 or self.main_process_ip == "127.0.0.1"):
            yield "several machines need main_process_ip and main_process_port, the same on each"


@dataclass(frozen=True)
class ValidationSettings:
    """`[train.validation]`: the loss on images that training does not see."""

    validation_fraction: float | Literal["auto"] = setting("auto", at_least=0, at_most=0.5, role="runtime")
    """Share of the images held out; "auto": none of less than 40, else 5 %, at least 2."""
    validate_every_epochs: int = setting(2, at_least=1, role="saving")
    early_stop_patience: int = setting(0, at_least=0, role="result")
    """Validations in a row with a smoothed loss of more than twice the lowest, after which the run ends; 0: off."""


@dataclass(frozen=True)
class SampleSettings:
    """`[train.samples]`: images that show what the LoRA has learned. "auto" is lowered where samples would take too long."""

    samples: bool = setting(True, role="saving")
    sample_prompts: str = setting("", role="saving")
    """A file of prompts or the prompts themselves, as JSON or one a line with kohya's options; empty: made from the captions."""
    subject_class: str = setting("", role="saving")
    """The word for the kind of subject, such as woman; empty: from the captions."""
    sample_every_epochs: int | Literal["auto"] = setting("auto", at_least=0, role="saving")
    """0: only the last one; "auto": as LoRA files."""
    sample_size: int | Literal["auto"] = setting("auto", at_least=64, at_most=2048, role="saving")
    """Pixels of a side; "auto": the resolution, at most 1024."""
    sample_steps: int | Literal["auto"] = setting("auto", at_least=1, at_most=200, role="saving")
    """Denoising steps of an image; "auto": 20."""
    sample_guidance: float = setting(6.0, at_least=1, at_most=30, role="saving")
    """Scale of classifier-free guidance; 1 is off."""
    sample_seed: int = setting(0, at_least=0, at_most=2**62, role="saving")
    """Of the first prompt; each further prompt has the next seed."""


@dataclass(frozen=True)
class SavingSettings:
    """`[train.saving]`: what is written, and when."""

    output_name: str = setting("", role="saving")
    """Name of the LoRA file without suffix; empty: the trigger word."""
    save_every_epochs: int = setting(5, at_least=0, role="saving")
    """0: only the last one."""
    lora_author: str = setting("", role="saving")
    """These two are in the metadata of LoRA files."""
    lora_description: str = setting("", role="saving")
    """Empty: what it was trained on."""
    save_state_every_minutes: float = setting(10.0, above=0, role="saving")
    keep_last_states: int = setting(2, at_least=1, at_most=100, role="saving")
    fresh: bool = setting(False, role="saving")
    """Archive the checkpoints and start again."""

    def validate(self) -> Iterator[str]:
        name = self.output_name
        if any(mark in name for mark in '/\\:*?"<>|\0') or name.startswith(".") or name != name.strip() or not name.isprintable():
            yield f"output_name: {name!r} must be a plain file name, without folders"
        if re.search(r"(-best|-recommended|-\d{6}|\.safetensors)$", name):
            endings = "-best, -recommended, -NNNNNN or .safetensors"
            yield f"output_name: {name!r} must not end in {endings}, which training uses for its own files"


@dataclass(frozen=True)
class LoggingSettings:
    """`[train.logging]`: where else metrics are recorded."""

    tensorboard: bool = setting(False, role="saving")
    wandb_api_key: str = setting("", secret=True, role="saving")
    wandb_project: str = setting("loracat", role="saving")

    def validate(self) -> Iterator[str]:
        if self.wandb_api_key and (problem := address_problem("WANDB_BASE_URL")):
            yield problem


def unsupported_by_fast_engine(lora: LoraSettings) -> str:
    """Why the fast engine cannot train this adapter; empty if it can."""
    if lora.lora_type not in ("lora", "dora"):
        return f"the fast engine does not support LORA_TYPE={lora.lora_type}"
    unsupported = {"LORA_DROPOUT": lora.lora_dropout, "TRAIN_TEXT_ENCODERS": lora.train_text_encoders}
    found = (f"{name}={str(value).lower()}" for name, value in unsupported.items() if value)
    return next((f"the fast engine does not support {each}" for each in found), "")


@dataclass(frozen=True)
class TrainSettings:
    """`[train]`: every table of the training stage."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    run: RunSettings = field(default_factory=RunSettings)
    processes: ProcessSettings = field(default_factory=ProcessSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    samples: SampleSettings = field(default_factory=SampleSettings)
    saving: SavingSettings = field(default_factory=SavingSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    def validate(self) -> Iterator[str]:
        unsupported = unsupported_by_fast_engine(self.lora)
        if self.run.engine == "fast" and unsupported:
            yield f"ENGINE=fast: {unsupported}; set ENGINE=auto"
        if self.objective.lora_l2 and self.lora.lora_type != "lora":
            yield f"lora_l2: is not supported with LORA_TYPE={self.lora.lora_type}; set LORA_L2=0, or LORA_TYPE=lora"
        if self.optimizer.loraplus_ratio != 1 and self.lora.lora_type not in ("lora", "dora"):
            yield f"loraplus_ratio: LORA_TYPE={self.lora.lora_type} has no `up` of its own; set LORAPLUS_RATIO=1, or LORA_TYPE=lora"
        yield from self._problems_of_text_encoder_lr()
        if self.lora.lora_type == "dora" and self.model.base_quantization == "int8":
            yield "LORA_TYPE=dora reads the weights of the base model as they are: set BASE_QUANTIZATION=none"

    def _problems_of_text_encoder_lr(self) -> Iterator[str]:
        rate = self.optimizer.text_encoder_lr
        if not self.lora.train_text_encoders:
            if rate != OptimizerSettings.text_encoder_lr:
                remedy = "set TRAIN_TEXT_ENCODERS=true, or TEXT_ENCODER_LR=1e-5"
                yield f"text_encoder_lr: {rate:g} has no effect without TRAIN_TEXT_ENCODERS; {remedy}"
        elif self.optimizer.optimizer == "prodigy" and rate < PRODIGY_LEAST_RATE:
            yield f"text_encoder_lr is a factor of the rate that prodigy finds: set TEXT_ENCODER_LR=1 (is {rate:g})"
