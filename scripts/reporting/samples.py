"""What the report shows of OUTPUT_DIR/samples: the sample images of every LoRA with their likeness, and which LoRA to use."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any

from common.captions import asked_subject
from common.files import as_object
from common.output_layout import OutputLayout
from common.thumbnails import SAMPLE_PX, Thumbnails
from reporting.records import Records, as_number


@dataclass(frozen=True)
class SampleImage:
    thumbnail: str
    link: str
    """Path of the PNG relative to the page; "" if it is gone."""
    likeness: float | None
    why: str
    """Why there is no likeness; empty if there is one, or it was not measured."""


@dataclass(frozen=True)
class SampleRow:
    """The images of one LoRA file, or of the base model, one for each prompt."""

    label: str
    file: str
    """Of the LoRA; empty for the base model."""
    step: float
    """Optimizer steps before it."""
    images: tuple[SampleImage, ...]
    likeness: float | None
    """Mean of the images that show the person; None if no such image has one."""
    is_recommended: bool = False


@dataclass(frozen=True)
class Samples:
    """The content of samples.json, as far as it is there."""

    prompts: tuple[str, ...] = ()
    rows: tuple[SampleRow, ...] = ()
    strengths: tuple[SampleRow, ...] = ()
    """The images of the recommended file at other strengths."""
    floor: float | None = None
    """Likeness of the base model's images: what anyone has."""
    ceiling: float | None = None
    """Likeness of the data set's images to each other."""
    file: str = ""
    """The recommended LoRA file; empty before the end of a run."""
    strength: str = "1.0"
    reason: str = ""

    @property
    def recommended(self) -> SampleRow | None:
        """The row of the recommended file at the recommended strength, else at full strength."""
        at_strength = [row for row in self.strengths if row.is_recommended]
        return next((row for row in (*at_strength, *self.rows) if row.is_recommended), None)

    @property
    def label(self) -> str:
        """Of the recommended file's row; empty if it has none."""
        return next((row.label for row in self.rows if row.is_recommended), "")

    @property
    def base(self) -> SampleRow | None:
        return next((row for row in self.rows if not row.file and row.step == 0), None)

    @property
    def is_scored(self) -> bool:
        return any(image.likeness is not None or image.why for row in self.rows for image in row.images)

    def position(self, likeness: float) -> float:
        """Where `likeness` lies between floor and ceiling, in per cent; without these, between 0 and 1."""
        low = 0.0 if self.floor is None else self.floor
        high = 1.0 if self.ceiling is None else self.ceiling
        return 100 * min(1.0, max(0.0, (likeness - low) / (high - low))) if high > low else 0.0


def read_samples(outputs: OutputLayout, trigger: str, records: Records, files_like: Callable[[str], Collection[str]]) -> Samples:
    """What `samples/<name>/samples.json` lists. `files_like`: the LoRA files with the weights of a file, by name."""
    record, samples = records.json(outputs.samples_record), Samples()
    if not record:
        return samples
    with records.reading(outputs.samples_record), Thumbnails(outputs.thumbnails) as thumbnails:
        prompts = [as_object(prompt) for prompt in record["prompts"]]
        texts = [str(prompt["text"]) for prompt in prompts]
        subjects = [asked_subject(str(prompt.get("kind")), str(prompt["text"]), [trigger]) for prompt in prompts]
        shows_person = [bool(prompt.get("subject", subject)) for prompt, subject in zip(prompts, subjects, strict=True)]
        advice = as_object(record.get("recommended"))
        file, strength = str(advice.get("file") or ""), as_number(advice.get("strength")) or 1.0

        # The images of the recommended LoRA are in two rows.
        listed = [*record["rows"], *(record.get("strengths") or ())]
        paths = dict.fromkeys(_path(name, outputs) for content in listed for name in content["images"])
        present = [path for path in paths if path.is_file()]
        thumbnail_of = dict(zip(present, thumbnails.of_all(present, SAMPLE_PX), strict=True))

        def row(content: Mapping[str, Any], label: str, is_recommended: bool) -> SampleRow:
            images = tuple(_images(content, outputs, thumbnail_of))
            shown = [image.likeness for image, counts in zip(images, shows_person, strict=False) if counts]
            known = [likeness for likeness in shown if likeness is not None]
            step = as_number(content.get("step")) or 0.0
            return SampleRow(label, str(content.get("file") or ""), step, images, mean(known) if known else None, is_recommended)

        same = {file, *files_like(file)} if file else set()
        rows = [row(each, str(each["label"]), each.get("file") in same) for each in record["rows"]]
        strengths = [
            row(each, f"strength {_decimal(each['strength'])}", abs(each["strength"] - strength) < 1e-6)
            for each in record.get("strengths") or ()
        ]
        samples = Samples(
            prompts=tuple(_with_seed(prompt, texts) for prompt in prompts),
            rows=tuple(rows),
            strengths=tuple(strengths),
            floor=as_number(record.get("floor")),
            ceiling=as_number(record.get("ceiling")),
            file=file if Path(file).name == file else "",
            strength=_decimal(strength),
            reason=str(advice.get("reason") or ""),
        )
    return samples


def _decimal(strength: float) -> str:
    return f"{strength:.1f}" if round(strength, 1) == strength else f"{strength:g}"


def _with_seed(prompt: Mapping[str, Any], texts: Sequence[str]) -> str:
    """The text of a prompt, and its seed if several prompts have that text."""
    text, seed = str(prompt["text"]), prompt.get("seed")
    return f"{text} (seed {seed})" if texts.count(text) > 1 and seed is not None else text


def _path(name: Any, outputs: OutputLayout) -> Path:
    return outputs.samples / (Path(str(name)).name if name else "missing")


def _images(content: Mapping[str, Any], outputs: OutputLayout, thumbnails: Mapping[Path, str]) -> list[SampleImage]:
    """The images of a row. Scores may be missing, in part or all of them."""
    names = content["images"]
    images = []
    scores, reasons = (content.get(key) or [] for key in ("likeness", "unscored"))
    for name, score, why in list(zip_longest(names, scores, reasons))[: len(names)]:
        path = _path(name, outputs)
        link = path.relative_to(outputs.report.parent).as_posix() if path in thumbnails else ""
        likeness = as_number(score)
        images.append(SampleImage(thumbnails.get(path, ""), link, likeness, "" if likeness is not None else str(why or "")))
    return images
