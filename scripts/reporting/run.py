"""What the report shows of OUTPUT_DIR: the latest run's LoRA files, metrics, settings and sample images."""

import contextlib
import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ModelError
from common.files import parse_json, read_file, read_json_lines
from common.masking import mask_address
from common.output_layout import OutputLayout
from common.weights import read_header
from reporting.thumbnails import Thumbnails

SAMPLE_SIZE_PX = 320
_ORIGIN = re.compile(r"^([a-z0-9_]+) = .*  # set by (.+)$")
"""A line of the resolved settings whose value is not the default."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA of the run."""

    name: str
    label: str
    """final, best, or the number of epochs after which it was saved."""
    size_mb: float
    sha256: str
    """Of the file without its header, by which model managers recognise it; "" if unknown."""


@dataclass(frozen=True)
class Setting:
    """A setting as the run used it."""

    key: str
    value: str
    origin: str
    """Where it was set; "" for a default."""


@dataclass(frozen=True)
class SampleImage:
    thumbnail: str
    link: str
    """Path of the PNG relative to the page; "" if it is gone."""
    likeness: float | None


@dataclass(frozen=True)
class SampleRow:
    """The images of one LoRA file, or of the base model, one for each prompt."""

    label: str
    images: tuple[SampleImage, ...]


@dataclass(frozen=True)
class Run:
    """A training run, finished or not."""

    name: str
    is_finished: bool
    loras: tuple[LoraFile, ...]
    metrics: tuple[dict[str, Any], ...]
    """One object for each optimizer step or validation."""
    settings: tuple[Setting, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    """The header of the newest LoRA file."""
    prompts: tuple[str, ...] = ()
    rows: tuple[SampleRow, ...] = ()
    recommended: dict[str, Any] = field(default_factory=dict)
    """`file`, `strength` and `reason`; empty before the end of a run, and without sample images."""

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every line of the metrics that has this value."""
        return [(line["step"], line[key]) for line in self.metrics if isinstance(line.get(key), int | float)]


def read_run(output_dir: Path) -> Run | None:
    """The run whose settings and metrics are in OUTPUT_DIR/lora, None if there is none. Half-written files are left out."""
    settings = _read_settings(OutputLayout(output_dir, "").resolved_config)
    name = next((s.value for s in settings if s.key == "train.saving.output_name"), "")
    if not name or Path(name).name != name:
        return None
    outputs = OutputLayout(output_dir, name)
    loras, metadata = [], {}
    for path in (outputs.lora, outputs.best, *outputs.saved_loras()):
        with contextlib.suppress(ModelError, OSError):
            header = read_header(path).metadata
            metadata = metadata or {str(key): str(value) for key, value in header.items()}
            label = path.stem.removeprefix(name).removeprefix("-").lstrip("0") or "final"
            label = f"after epoch {label}" if label.isdecimal() else label
            loras.append(LoraFile(path.name, label, path.stat().st_size / 1e6, str(header.get("sshs_model_hash", ""))))
    metrics = []
    with contextlib.suppress(OSError):
        metrics = [line for line in read_json_lines(outputs.metrics) if isinstance(line.get("step"), int)]
    prompts, rows, recommended = _read_samples(outputs)
    is_finished = outputs.lora.is_file()
    return Run(name, is_finished, tuple(loras), tuple(metrics), settings, metadata, prompts, rows, recommended)


def _read_settings(path: Path) -> tuple[Setting, ...]:
    """Every setting in the resolved settings, in the order of the file, without logins and without the folders of a path."""
    try:
        text = read_file(path).decode()
        tables = tomllib.loads(text)
    except (OSError, ValueError):
        return ()
    origins, table = {}, ""
    for line in text.splitlines():
        if line.startswith("["):
            table = line.strip("[]") + "."
        elif match := _ORIGIN.match(line):
            origins[table + match[1]] = match[2]
    return tuple(Setting(key, _shown(value), origins.get(key, "")) for key, value in _flat(tables))


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    entries = []
    for key, value in table.items():
        entries += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return entries


def _shown(value: Any) -> str:
    """A value as the page shows it. Of a path only the last part: the page may be passed on."""
    if isinstance(value, str):
        value = mask_address(value)
        is_path = value.startswith(("/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", value)
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1] if is_path else value
    return json.dumps(value, ensure_ascii=False)


def _read_samples(outputs: OutputLayout) -> tuple[tuple[str, ...], tuple[SampleRow, ...], dict[str, Any]]:
    """Prompts, rows and the recommendation of `samples/<name>/samples.json`."""
    folder = outputs.samples
    try:
        record = parse_json(read_file(outputs.samples_record))
        prompts = tuple(str(prompt["text"]) for prompt in record["prompts"])
        rows = []
        with Thumbnails(folder / ".thumbnails") as thumbnails:
            for row in record["rows"]:
                scores = row.get("likeness") or [None] * len(row["images"])
                images = []
                for file, score in zip(row["images"], scores, strict=True):
                    path = folder / Path(file).name if file else folder / "missing"
                    link = path.relative_to(outputs.report.parent).as_posix() if path.is_file() else ""
                    images.append(SampleImage(thumbnails.of(path, SAMPLE_SIZE_PX), link, score))
                rows.append(SampleRow(str(row["label"]), tuple(images)))
        recommended = record.get("recommended")
        return prompts, tuple(rows), recommended if isinstance(recommended, dict) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return (), (), {}
