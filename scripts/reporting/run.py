"""What the report shows of OUTPUT_DIR: the latest run's LoRA files, metrics, settings, history and sample images."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import ModelError
from common.files import read_file, read_json_lines
from common.output_layout import OutputLayout
from common.weights import read_header
from reporting.recipe import Fact, Setting, facts_of, read_settings, shown
from reporting.records import Records, as_number, as_numbers
from reporting.samples import Samples, read_samples

NAME, SAMPLES = "train.saving.output_name", "train.samples.samples"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA of the run."""

    name: str
    label: str
    """final, best, recommended, or the number of epochs after which it was saved."""
    size_mb: float
    sha256: str
    """Of the file without its header, by which model managers recognise it; "" if unknown."""
    metadata: dict[str, str]


@dataclass(frozen=True)
class Run:
    """A training run, finished or not."""

    name: str
    is_finished: bool
    loras: tuple[LoraFile, ...]
    metrics: tuple[dict[str, Any], ...]
    """One object for each optimizer step or validation."""
    settings: tuple[Setting, ...]
    facts: tuple[Fact, ...]
    samples: Samples
    total_steps: int
    """Of the whole run; 0 if unknown."""
    workflow: str
    """Name of the workflow for ComfyUI; empty if there is none."""
    unreadable: tuple[str, ...]
    """Files that cannot be read."""
    relative_losses: dict[str, float] = field(default_factory=dict)
    """Image -> its loss, as a multiple of what the others have at the same timesteps."""
    never_fit: tuple[str, ...] = ()
    """Images whose loss is unusually high, the highest first."""
    learned_at_once: tuple[str, ...] = ()
    """Those whose loss is unusually low."""

    @property
    def metadata(self) -> dict[str, str]:
        """The header of the final LoRA file, else of any that there is."""
        final = [lora for lora in self.loras if lora.label == "final"]
        return next((lora.metadata for lora in (*final, *self.loras)), {})

    @property
    def has_samples_off(self) -> bool:
        """Whether its settings say that there are no sample images."""
        return any((setting.key, setting.value) == (SAMPLES, "false") for setting in self.settings)

    @property
    def file_to_use(self) -> str:
        """The recommended LoRA; without a recommendation the final one; empty if there is none yet."""
        names = {lora.label: lora.name for lora in self.loras}
        if self.samples.file:
            return names.get("recommended", self.samples.file)
        return names.get("recommended", names.get("final", ""))

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every line of the metrics that has this value."""
        found = ((line["step"], as_number(line.get(key))) for line in self.metrics)
        return [(step, value) for step, value in found if value is not None]

    @property
    def steps(self) -> int:
        """How many optimizer steps were taken."""
        return max((line["step"] + 1 for line in self.metrics if "lr" in line), default=0)


def read_run(output_dir: Path, trigger: str) -> Run | None:
    """The run whose settings and metrics are in OUTPUT_DIR/lora, None if there is none. Half-written files are left out.

    Without readable settings it is taken for the run that is named after the trigger word.
    """
    records, settings = Records(output_dir), ()
    config = OutputLayout(output_dir, "").resolved_config
    with records.reading(config):
        settings = read_settings(read_file(config).decode())
    name = next((setting.value for setting in settings if setting.key == NAME), trigger)
    if not name or Path(name).name != name:
        return None
    outputs = OutputLayout(output_dir, name)
    loras = _read_loras(outputs, records)
    hashes = {lora.name: lora.sha256 for lora in loras if lora.sha256}

    def files_like(file: str) -> Collection[str]:
        return [other for other, sha256 in hashes.items() if sha256 == hashes.get(file)]

    metrics, history = [], []
    with records.reading(outputs.metrics):
        metrics = [line for line in read_json_lines(outputs.metrics) if type(line.get("step")) is int]
        if not metrics and outputs.metrics.exists() and outputs.metrics.stat().st_size:
            raise ValueError
    with records.reading(outputs.history):
        history = read_json_lines(outputs.history)
    losses = records.json(outputs.image_losses)
    samples = read_samples(outputs, trigger, records, files_like)
    if not samples.file and loras:
        samples = replace(samples, **_advice_of(loras[0]))
    if not (settings or loras or metrics or records.unreadable):
        return None
    return Run(
        name=name,
        is_finished=any(lora.label == "final" for lora in loras),
        loras=loras,
        metrics=tuple(metrics),
        settings=settings,
        facts=facts_of(history),
        samples=samples,
        total_steps=next((int(as_number(line.get("steps")) or 0) for line in reversed(history) if "steps" in line), 0),
        workflow=outputs.workflow.name if outputs.workflow.is_file() else "",
        unreadable=tuple(dict.fromkeys(records.unreadable)),
        relative_losses=as_numbers(losses.get("relative_loss")),
        **{name: _names(losses.get(name)) for name in ("never_fit", "learned_at_once")},
    )


def _names(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _advice_of(lora: LoraFile) -> dict[str, str]:
    """What the header of the recommended LoRA says, as fields of Samples; {} for another LoRA. It is there without sample images,
    too."""
    advice = {name: lora.metadata.get(f"loracat_recommended_{name}", "") for name in ("file", "strength", "reason")}
    return advice if advice["file"] and Path(advice["file"]).name == advice["file"] else {}


def _read_loras(outputs: OutputLayout, records: Records) -> tuple[LoraFile, ...]:
    """The LoRA files of the run that are complete, the recommended one first."""
    loras = []
    for path in (outputs.recommended, outputs.lora, outputs.best, *outputs.saved_loras()):
        with records.reading(path):
            size = path.stat().st_size
            try:
                header = read_header(path).metadata
            except ModelError as error:
                raise ValueError from error
            metadata = {str(key): shown(str(value)) for key, value in header.items()}
            label = path.stem.removeprefix(outputs.name).removeprefix("-").lstrip("0") or "final"
            label = f"after epoch {label}" if label.isdecimal() else label
            loras.append(LoraFile(path.name, label, size / 1e6, metadata.get("sshs_model_hash", ""), metadata))
    return tuple(loras)
