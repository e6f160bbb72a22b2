"""What samples say of a LoRA: likeness, fidelity to the prompt, leakage, drift of the class, diversity.

Likeness is a distance between identities on a scale whose ends are measured, too: 0 is the base model asked for anybody, 1 the
drawn person behind the VAE.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from benchmarks.world.artist import Artist
from benchmarks.world.drawing import draw
from benchmarks.world.people import ALL_TAGS, GROUPS, Shot, identity_vector
from benchmarks.world.reader import Reader, attribute_accuracy, identity_error
from benchmarks.world.subjects import CLASS_WORD, FILE_PX, Subject

ALONE, SCENE, CLASS = "alone", "scene", "class"
"""Kinds of prompts: the trigger word alone, in a scene that the data set never has, and the class word without it."""
COUNTS = {ALONE: 16, SCENE: 32, CLASS: 16}
FREE = ("clothes", "expression", "background", "light", "framing", "gaze")
"""Groups of tags in which samples of the trigger word alone can differ."""


@dataclass(frozen=True)
class Prompt:
    """One sample."""

    kind: str
    text: str
    """With `{}` for the trigger word and the comma behind it, or without."""
    seed: int
    shot: Shot | None = None
    asked: tuple[str, ...] = ()
    """Tags of the shot."""

    def of(self, trigger: str) -> str:
        """The text with the trigger word, or for the base model without (empty)."""
        return self.text.format(f"{trigger}, " if trigger else "").removesuffix(", ") or CLASS_WORD


def prompts_of(subject: Subject, counts: Mapping[str, int] = COUNTS) -> list[Prompt]:
    """The same for every LoRA of the subject, in the order of `counts`."""
    alone = [Prompt(ALONE, "{}", 1000 + number) for number in range(counts[ALONE])]
    texts = [(shot, subject.prompt(shot)) for shot in subject.scenes(counts[SCENE])]
    scenes = [
        Prompt(SCENE, f"{{}}{text}", 2000 + number, shot, tuple(text.split(", "))) for number, (shot, text) in enumerate(texts)
    ]
    return alone + scenes + [Prompt(CLASS, CLASS_WORD, 3000 + number) for number in range(counts[CLASS])]


def render(artist: Artist, prompts: Sequence[Prompt], trigger: str) -> torch.Tensor:
    """[N, 3, side, side]; the base model's with an empty `trigger`."""
    return artist.render([prompt.of(trigger) for prompt in prompts], [prompt.seed for prompt in prompts])


class Judge:
    """Measures the LoRAs of a subject. What they are compared with is measured once."""

    def __init__(self, subject: Subject, artist: Artist, reader: Reader, counts: Mapping[str, int] = COUNTS):
        self.subject, self.artist, self.prompts = subject, artist, prompts_of(subject, counts)
        self._reader = reader
        self._truth = torch.from_numpy(identity_vector(subject.identity))
        self.base = self._raw(render(artist, self.prompts, ""))
        """Of the base model."""
        shots = {ALONE: list(subject.shots(counts[ALONE])), SCENE: [prompt.shot for prompt in self.prompts if prompt.shot]}
        files = [draw(subject.identity, shot, FILE_PX) for shot in shots[ALONE] + shots[SCENE]]
        pixels = [np.asarray(file.resize((artist.side, artist.side), Image.Resampling.LANCZOS)) for file in files]
        drawn = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        self.shown = artist.through_vae(drawn)
        """The person as drawn, in shots of the data set and in the scenes."""
        self.drawn = self._raw(self.shown)

    def measure(self, images: torch.Tensor) -> dict[str, float]:
        """Measures of images that were rendered from `prompts`."""
        found, scale = self._raw(images), {}
        for kind, end in ((ALONE, ALONE), (SCENE, SCENE), (CLASS, ALONE)):
            floor, ceiling = self.base[f"distance_{kind}"], self.drawn[f"distance_{end}"]
            scale[kind] = (floor - found[f"distance_{kind}"]) / (floor - ceiling)
        return {
            "likeness": (scale[ALONE] + scale[SCENE]) / 2,
            "likeness_alone": scale[ALONE],
            "likeness_scene": scale[SCENE],
            "fidelity": found["fidelity"],
            "leakage": found[f"habit_{ALONE}"] - self.base[f"habit_{ALONE}"],
            "class_leakage": found[f"habit_{CLASS}"] - self.base[f"habit_{CLASS}"],
            "drift": scale[CLASS],
            "diversity": found["diversity"] / max(self.base["diversity"], 1e-6),
        }

    def likeness_of(self, images: torch.Tensor) -> list[float]:
        """How near each image is to the person, 1 at most, as a face model's score."""
        tags = self._reader.tags(images)
        return (1 - self._distances(images, [_shown(row, ("framing", "expression")) for row in tags]) / 2).tolist()

    def _raw(self, images: torch.Tensor) -> dict[str, float]:
        """Distances by kind of prompt, and shares of samples. Images without prompts of the class are allowed."""
        tags = self._reader.tags(images)
        raw = {}
        for kind in (ALONE, SCENE, CLASS):
            rows = [row for row, prompt in enumerate(self.prompts[: len(images)]) if prompt.kind == kind]
            if not rows:
                continue
            shown = [_shown(tags[row], ("framing", "expression")) for row in rows]
            raw[f"distance_{kind}"] = self._distances(images[rows], shown).mean().item()
            raw[f"habit_{kind}"] = float(np.mean([self._habits(tags[row]) for row in rows]))
            if kind == ALONE:
                raw["diversity"] = _diversity(tags[rows])
            if kind == SCENE:
                raw["fidelity"] = attribute_accuracy([self.prompts[row].asked for row in rows], tags[rows])["overall"]
        return raw

    def _distances(self, images: torch.Tensor, shown: Sequence[set[str]]) -> torch.Tensor:
        """[N]: from the person, over the readable traits that can be seen in images that show these tags."""
        read = self._reader.identity(images)
        return identity_error(self._truth.expand_as(read), read, shown, self._reader.readable)

    def _habits(self, probabilities: torch.Tensor) -> float:
        """The share of the two habits that an image shows."""
        shown = _shown(probabilities, ("clothes", "background"))
        return ((" ".join(self.subject.outfit) in shown) + (self.subject.background in shown)) / 2


def _shown(probabilities: torch.Tensor, groups: Sequence[str]) -> set[str]:
    """The likeliest tag of each group."""
    return {max(GROUPS[group], key=lambda tag: probabilities[ALL_TAGS.index(tag)].item()) for group in groups}


def _diversity(probabilities: torch.Tensor) -> float:
    """The chance that two samples differ in a free group, the mean over the groups."""
    shares = []
    for group in FREE:
        shown = [next(iter(_shown(row, [group]))) for row in probabilities]
        counts = np.array([shown.count(tag) for tag in GROUPS[group]])
        pairs = len(shown) * (len(shown) - 1)
        shares.append(1 - (counts * (counts - 1)).sum() / pairs)
    return float(np.mean(shares))
