"""What a run writes on its way, and what its LoRA files say about themselves."""

from dataclasses import dataclass

from training import checkpoint
from training.checkpoint import StateWriter
from training.export import Description, write_lora
from training.lora import LoraWeights
from training.plan import fingerprint_hash
from training.progress import Progress
from training.step import TrainStep
from training.task import Task


@dataclass(frozen=True)
class Saver:
    """Writes what the loop asks for."""

    task: Task
    trained: LoraWeights
    step: TrainStep
    states: StateWriter

    def state(self, progress: Progress) -> None:
        """Begin to write everything needed to continue from `progress`."""
        self.states.begin(checkpoint.snapshot(self.trained.weights, self.step.optimizer, self.step.scaler, progress))

    def check(self) -> None:
        """Raise what the last save has met, if it is over."""
        self.states.check()

    def wait(self) -> None:
        """Wait until what was begun is on the disk."""
        self.states.wait()

    def lora(self, epochs: int) -> None:
        """The LoRA as it is after `epochs` epochs."""
        write_lora(self.task.results.lora_after(epochs), self.trained.modules, description_of(self.task, epochs))


class Onlooker:
    """Saver of the processes that do not write."""

    def state(self, progress: Progress) -> None:
        pass

    def check(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def lora(self, epochs: int) -> None:
        pass


def description_of(task: Task, epochs: int) -> Description:
    settings = task.settings
    return Description(
        name=task.results.name,
        trigger_word=task.project.trigger_word,
        rank=settings.lora.lora_rank,
        alpha=settings.lora.lora_alpha,
        base_name=task.base.name,
        prediction_type=task.plan.schedule.prediction_type,
        resolution=settings.data.resolution,
        captions=[example.caption for example in task.plan.examples],
        images=len(task.plan.examples),
        epochs=epochs,
        steps=sum(step.epoch < epochs for step in task.plan.order),
        batch_size=settings.run.train_batch_size,
        learning_rate=settings.optimizer.learning_rate,
        seed=settings.run.train_seed,
        fingerprint=fingerprint_hash(task.identity.fingerprint),
    )
