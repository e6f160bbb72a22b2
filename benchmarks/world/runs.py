"""The trainings: a recipe, a person and a seed each; their files, and how they are run."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.world import peer, product
from benchmarks.world.pretrain import join
from benchmarks.world.reader import Reader
from benchmarks.world.recipes import Arm
from benchmarks.world.subjects import CLASS_WORD, Subject, subject
from benchmarks.world.tagger import write_tagger
from common.dataset_layout import DatasetFolder
from common.files import parse_json, read_file
from common.output_layout import OutputLayout


@dataclass(frozen=True)
class World:
    """The models, and the folder of the experiment."""

    source: Path
    """What the pre-training has written: a diffusers folder with more in it, or its parts."""
    work: Path
    peer: Path | None = None
    """The peer's script."""
    rate: float = 1e-4
    """The learning rate of the base recipe."""

    @property
    def model(self) -> Path:
        """The base model, a diffusers folder."""
        return self.source if (self.source / "model_index.json").exists() else self.work / "models" / "world"

    @property
    def tagger(self) -> Path:
        return self.work / "models" / "tagger"

    @property
    def side(self) -> int:
        """Of images, in pixels."""
        return self._described["px"]

    @property
    def is_simple(self) -> bool:
        """Whether it has simple shots alone."""
        return self._described.get("is_simple", False)

    @cached_property
    def _described(self) -> dict[str, Any]:
        return parse_json(read_file(self.source / "world.json"))

    def reader(self, device: torch.device | str = "cpu") -> Reader:
        return Reader.load(self.model / "reader", device)

    def write_models(self) -> int:
        """Write the models that are not there; returns an exit code."""
        if not (self.tagger / "selected_tags.csv").exists():
            if self.model != self.source:
                join(self.source, self.model)
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
        return subject(self.number, self.world.is_simple)

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
            "LEARNING_RATE": self.world.rate * self.arm.rate,
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
        options = {
            "resolution": self.world.side,
            "seed": self.seed,
            "learning_rate": self.world.rate * self.arm.rate,
            **self.arm.peer,
            **length,
        }
        return peer.train(self.world.peer, self.world.model, self.dataset, self.output, options)

    def saves(self) -> dict[int, Path]:
        """Epochs -> LoRA file, the earliest first."""
        epochs, every = self.length.values()
        if self.arm.peer is not None:
            return peer.saves(self.output, self._peer_steps, every)
        files = {int(path.stem[-6:]): path for path in self.layout.saved_loras()}
        return files | {epochs: self.layout.lora}


def runs_of(arms: Iterable[Arm], subjects: int, seeds: int, world: World) -> list[Run]:
    """In an order in which a part of them is a smaller experiment."""
    runs = [Run(arm, number, seed, world) for arm in arms for seed in range(min(seeds, arm.seeds)) for number in range(subjects)]
    return sorted(runs, key=lambda run: (run.seed + run.arm.wait, run.number))


def slug(name: str) -> str:
    """A name for files: letters, digits and `-`."""
    return "".join(each if each.isalnum() else "-" for each in name.lower()).strip("-")
