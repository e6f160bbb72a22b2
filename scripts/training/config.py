"""The training settings as types: `[train]` and the tables inside it. Standard library and `setting_values` only."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from common.settings import setting

OnOffAuto = bool | Literal["auto"]


@dataclass(frozen=True)
class ModelSettings:
    """`[train.model]`: the base that is adapted."""

    base_model: str = setting("stable-diffusion-xl-base-1.0")
    """A diffusers folder or a `.safetensors` file: its name in MODELS_DIR, or a path."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = setting("auto")
    zero_terminal_snr: OnOffAuto = setting("auto")
    mixed_precision: Literal["bf16", "fp16", "no"] = setting("bf16")
    gradient_checkpointing: OnOffAuto = setting("auto")


@dataclass(frozen=True)
class DataSettings:
    """`[train.data]`: how images and captions become examples."""

    resolution: int = setting(1024, at_least=64, at_most=4096)
    """Pixels: a bucket's area is at most `resolution` squared."""
    bucket_step: int = setting(64, at_least=8, at_most=256)
    """Pixels: sides of buckets are multiples of this. The smallest image that is taken has 256 px."""
    bucket_max_side: int = setting(2048, at_least=64, at_most=8192)
    """Pixels: the longest side of a bucket."""
    caption_dropout: float = setting(0.05, at_least=0, at_most=1)
    """Share of the samples that see the empty caption."""
    caption_shuffle: bool = setting(True)
    caption_variants: int = setting(8, at_least=1, at_most=64)
    """How many shuffles of a caption are encoded."""
    caption_chunks: int = setting(3, at_least=1, at_most=8)
    """Chunks of 75 tokens that a caption may fill at most."""
    dataloader_num_workers: int = setting(4, at_least=0, at_most=64)
    skip_flagged: bool = setting(False)
    """Leave out the images that the caption stage's audit flagged."""

    def validate(self) -> Iterator[str]:
        if self.resolution % self.bucket_step or self.bucket_step % 8:
            yield "resolution must be a multiple of bucket_step, and bucket_step of 8"
        if self.bucket_max_side < self.resolution:
            yield "bucket_max_side must not be smaller than resolution"


@dataclass(frozen=True)
class LoraSettings:
    """`[train.lora]`: the adapter."""

    lora_rank: int = setting(32, at_least=1, at_most=1024)
    lora_alpha: float = setting(32.0, at_least=0.001, at_most=60000)
    """The adapter is scaled by alpha / rank. The file holds it in fp16."""
    lora_targets: Literal["all", "attention"] = setting("all")


@dataclass(frozen=True)
class ObjectiveSettings:
    """`[train.objective]`: what is minimised."""

    min_snr_gamma: float | Literal["auto"] = setting("auto", at_least=0)
    """0 is off; "auto": 5, off for v-prediction and zero-terminal-SNR bases."""
    noise_offset: float | Literal["auto"] = setting("auto", at_least=0, at_most=1)
    """0 is off; "auto": 0.0357, off for v-prediction and zero-terminal-SNR bases."""


@dataclass(frozen=True)
class OptimizerSettings:
    """`[train.optimizer]`: AdamW and its learning rate."""

    learning_rate: float = setting(1e-4, above=0, at_most=1)
    lr_scheduler: Literal["constant", "linear", "cosine"] = setting("constant")
    lr_warmup: float = setting(0.05, at_least=0, at_most=1)
    """Share of the optimizer steps over which the rate rises from 0."""
    weight_decay: float = setting(0.01, at_least=0, at_most=1)
    adam_beta1: float = setting(0.9, at_least=0, at_most=0.99999)
    adam_beta2: float = setting(0.999, at_least=0, at_most=0.9999999)
    adam_epsilon: float = setting(1e-8, above=0, at_most=1)
    max_grad_norm: float = setting(1.0, at_least=0)
    """The gradient is scaled down to this norm; 0 is off."""


@dataclass(frozen=True)
class RunSettings:
    """`[train.run]`: how long, and how much at once."""

    train_batch_size: int | Literal["auto"] = setting(4, at_least=1, at_most=4096)
    """Images at once; "auto": as many as fit into the memory, or as the saved run can take."""
    gradient_accumulation_steps: int = setting(1, at_least=1, at_most=4096)
    num_train_epochs: int = setting(20, at_least=1, at_most=100000)
    train_seed: int = setting(0, at_least=0, at_most=2**63 - 1)
    deterministic: bool = setting(False)
    """Only algorithms that give the same bits each time on the same GPU."""
    memory_floor_gib: float | Literal["auto"] = setting("auto", at_least=0, at_most=4096)
    """GiB of memory below which the run saves its state and ends; 0: no guard; "auto": a sixteenth of the memory where CPU
    and GPU share it and on a CPU, none elsewhere."""


@dataclass(frozen=True)
class ProcessSettings:
    """`[train.processes]`: one process per GPU, on one machine or several."""

    num_processes: int = setting(1, at_least=1, at_most=64)
    """On each machine."""
    num_machines: int = setting(1, at_least=1, at_most=64)
    machine_rank: int = setting(0, at_least=0, at_most=63)
    """Which of the machines this is; 0 decides and writes."""
    main_process_ip: str = setting("127.0.0.1")
    """Address of machine 0."""
    main_process_port: int = setting(0, at_least=0, at_most=65535)
    """0: any free port, which only one machine can do."""

    def validate(self) -> Iterator[str]:
        if self.machine_rank >= self.num_machines:
            yield "machine_rank must be below num_machines"
        if self.num_machines > 1 and (self.main_process_port == 0 or self.main_process_ip == "127.0.0.1"):
            yield "several machines need main_process_ip and main_process_port, the same on each"


@dataclass(frozen=True)
class ValidationSettings:
    """`[train.validation]`: the loss on images that training does not see."""

    validation_fraction: float | Literal["auto"] = setting("auto", at_least=0, at_most=0.5)
    """Share of the images held out; "auto": none of less than 40, else 5 %, at least 2."""
    validate_every_epochs: int = setting(2, at_least=1)
    early_stop_patience: int = setting(0, at_least=0)
    """Validations in a row without a lower smoothed loss after which the run ends; 0: off."""


@dataclass(frozen=True)
class SavingSettings:
    """`[train.saving]`: what is written, and when."""

    output_name: str = setting("")
    """Name of the LoRA file without suffix; empty: the trigger word."""
    save_every_epochs: int = setting(5, at_least=0)
    """0: only the last one."""
    save_state_every_minutes: float = setting(10.0, above=0)
    keep_last_states: int = setting(2, at_least=1, at_most=100)
    fresh: bool = setting(False)
    """Begin anew and lay the saved state aside."""

    def validate(self) -> Iterator[str]:
        name = self.output_name
        if any(mark in name for mark in '/\\:*?"<>|\0') or name.startswith(".") or name != name.strip() or not name.isprintable():
            yield f"output_name: {name!r} must be a plain file name, without folders"
        if re.search(r"(-best|-\d{6}|\.safetensors)$", name):
            yield f"output_name: {name!r} must not end as the files do that a run saves on its way"


@dataclass(frozen=True)
class LoggingSettings:
    """`[train.logging]`: who else is told about the steps."""

    tensorboard: bool = setting(False)
    wandb_api_key: str = setting("", secret=True)
    wandb_project: str = setting("loracat")


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
    saving: SavingSettings = field(default_factory=SavingSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
