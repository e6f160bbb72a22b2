"""The trainings that are compared: recipes that differ from the base recipe in one factor, people, and seeds."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from benchmarks.world import peer, product
from benchmarks.world.models import image_side, write_base_model, write_tagger
from benchmarks.world.reader import Reader
from benchmarks.world.subjects import CLASS_WORD, Subject, subject
from common.dataset_layout import DatasetFolder
from common.output_layout import OutputLayout


@dataclass(frozen=True)
class Arm:
    """A recipe; what it does not say is the default."""

    name: str
    settings: dict[str, object] = field(default_factory=dict)
    """Of the training stage."""
    captions: dict[str, object] = field(default_factory=dict)
    """Of the caption stage."""
    images: int = 25
    samples: int = product.SAMPLES_OF_A_RUN
    """Training samples of the run."""
    saves: int = product.SAVES
    peer: dict[str, object] | None = None
    """Arguments of the peer's script, which trains in the product's place."""


PICKED = {
    "VALIDATION_FRACTION": 0.2,
    "VALIDATE_EVERY_EPOCHS": 10,
    "SAMPLES": "true",
    "SAMPLE_STEPS": 20,
    "SAMPLE_EVERY_EPOCHS": 20,
}
"""What `-best` and `-recommended` are chosen from."""
BASE = Arm("base")
ROUNDS = {
    "first": [
        BASE,
        Arm("no min-SNR", {"MIN_SNR_GAMMA": 0}),
        Arm("no offset", {"NOISE_OFFSET": 0}),
        Arm("lr 5e-5", {"LEARNING_RATE": 5e-5}),
        Arm("lr 2e-4", {"LEARNING_RATE": 2e-4}),
        Arm("alpha r/2", {"LORA_ALPHA": 16}),
        Arm("rank 8", {"LORA_RANK": 8}),
        Arm("pruned traits", captions={"CAPTION_PRUNE_TRAITS": 0.8}),
        Arm("lr 4e-4", {"LEARNING_RATE": 4e-4}),
        Arm("lr 1e-3", {"LEARNING_RATE": 1e-3}),
    ],
    "second": [
        BASE,
        Arm("published", {"MIN_SNR_GAMMA": 0, "NOISE_OFFSET": 0, "LEARNING_RATE": 5e-5, "LORA_ALPHA": 16}),
        Arm("average", {"EMA_DECAY": 0.99}),
        Arm("no caption dropout", {"CAPTION_DROPOUT": 0}),
        Arm("caption dropout 0.2", {"CAPTION_DROPOUT": 0.2}),
        Arm("prior", {"PRIOR_PRESERVATION": 1}),
        Arm("huber", {"LOSS": "huber"}),
        Arm("int8 base", {"BASE_QUANTIZATION": "int8"}),
        Arm("prompts", captions={"CAPTION_SOURCE": "prompt"}),
        Arm("10 images", images=10),
        Arm("40 images", images=40),
    ],
    "length": [
        Arm("10 images, long", images=10, samples=8000, saves=16),
        Arm("25 images, long", samples=8000, saves=16),
        Arm("100 images, long", images=100, samples=8000, saves=16),
    ],
    "picks": [Arm("picks", PICKED, samples=6000, saves=12)],
    "peer": [
        BASE,
        Arm("attention only", {"LORA_TARGETS": "attention"}),
        Arm("peer, its recipe", peer={}),
        Arm("peer, our recipe", peer={"rank": 32, "snr_gamma": 5.0, "noise_offset": 0.0357}),
    ],
}
"""By the names that `--round` takes."""


@dataclass(frozen=True)
class World:
    """The models, and the folder of the experiment."""

    origin: Path
    """What the pre-training has written."""
    work: Path
    peer: Path | None = None
    """The peer's script."""

    @property
    def model(self) -> Path:
        """The base model, a diffusers folder."""
        return self.work / "models" / "world"

    @property
    def tagger(self) -> Path:
        return self.work / "models" / "tagger"

    @cached_property
    def side(self) -> int:
        """Of images, in pixels."""
        return image_side(self.origin)

    def reader(self, device: torch.device | str = "cpu") -> Reader:
        return Reader.load(self.origin / "reader", device)

    def write_models(self) -> int:
        """Write base model and tagger, unless they are there; returns an exit code."""
        if not (self.tagger / "selected_tags.csv").exists():
            write_base_model(self.origin, self.model)
            write_tagger(self.reader(), self.tagger)
        return 0


@dataclass(frozen=True)
class Run:
    """One training."""

    arm: Arm
    number: int
    """Of the subject."""
    seed: int
    world: World

    @cached_property
    def subject(self) -> Subject:
        return subject(self.number)

    @property
    def name(self) -> str:
        return f"{slug(self.arm.name)}-p{self.number:02d}-s{self.seed}"

    @property
    def dataset(self) -> DatasetFolder:
        """Runs with the same images and captions share it."""
        captions = [slug(f"{name}{value}") for name, value in self.arm.captions.items()]
        return DatasetFolder(self.world.work / "sets" / "-".join([f"p{self.number:02d}", str(self.arm.images), *captions]))

    @property
    def output(self) -> Path:
        return self.world.work / "runs" / self.name

    @property
    def log(self) -> Path:
        return self.world.work / "logs" / f"{self.name}.log"

    @property
    def result(self) -> Path:
        return self.world.work / "results" / f"{self.name}.json"

    @property
    def layout(self) -> OutputLayout:
        return OutputLayout(self.output, self.subject.trigger)

    @property
    def length(self) -> dict[str, int]:
        return product.length(self.arm.images, self.arm.samples, self.arm.saves)

    @property
    def _peer_steps(self) -> int:
        """Steps between two saves, as many as the product takes."""
        return self.arm.images * self.length["SAVE_EVERY_EPOCHS"] // peer.BATCH

    def variables(self) -> dict[str, str]:
        """The environment of its stages."""
        settings = {
            **self.length,
            "RESOLUTION": self.world.side,
            "TRAIN_SEED": self.seed,
            "SUBJECT_CLASS": CLASS_WORD,
            "CAPTION_MODEL": self.world.tagger,
        }
        settings |= self.arm.captions | self.arm.settings
        return product.environment(self.world.model, self.dataset.root, self.output, self.subject.trigger, **settings)

    def prepare(self) -> int:
        """Draw and caption the data set; returns an exit code."""
        self.subject.write_images(self.dataset, self.arm.images)
        product.caption(self.variables(), self.log)
        return 0

    def train(self) -> int:
        """Train in this process, which has the run's `variables`; returns an exit code."""
        if self.arm.peer is None:
            return product.train()
        steps = self._peer_steps
        length = {"max_train_steps": steps * self.arm.saves, "checkpointing_steps": steps}
        options = {"resolution": self.world.side, "seed": self.seed, **self.arm.peer, **length}
        return peer.train(self.world.peer, self.world.model, self.dataset, self.output, options)

    def saves(self) -> dict[int, Path]:
        """Epochs -> LoRA file, the earliest first."""
        epochs, every = self.length.values()
        if self.arm.peer is not None:
            return peer.saves(self.output, self._peer_steps, every)
        files = {int(path.stem[-6:]): path for path in self.layout.saved_loras()}
        return files | {epochs: self.layout.lora}


def runs_of(arms: Iterable[Arm], subjects: Iterable[int], seeds: Iterable[int], world: World) -> Iterator[Run]:
    """In an order in which a part of them is a smaller experiment."""
    arms, subjects = list(arms), list(subjects)
    for seed in seeds:
        for number in subjects:
            for arm in arms:
                yield Run(arm, number, seed, world)


def slug(name: str) -> str:
    """A name for files: letters, digits and `-`."""
    return "".join(each if each.isalnum() else "-" for each in name.lower()).strip("-")
