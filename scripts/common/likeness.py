"""How much the faces of images look like those of a data set. Where it cannot be told, there is a reason instead of a number.

The likeness of an image is the mean similarity of its face to the faces of the other images.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.faces import FACE_MODELS, FaceModel, why_unusable
from common.files import append_json_line, read_json_lines

MAX_FACES = 2
"""Of one image: embedding a face takes most of the time."""
MIN_SHARE_OF_LARGEST = 0.5
"""A face that is narrower than this share of the largest one belongs to the background."""
MIN_FACES = 3
"""A likeness is the mean of at least this many similarities."""
MOST_COMPARED = 1000
"""Each face of a set is compared with at most so many others, spread evenly over it, so that the time grows with the set alone."""
FRAMINGS = {"close": 0.25, "half": 0.1, "full": 0.0}
"""Name -> height of the face / height of the image, at least: a head, the upper body, or the whole person fills the image."""
NO_FACE = "no face was found"


@dataclass(frozen=True)
class FoundFace:
    """A face of an image."""

    width_px: int
    """Of the detector's box, from temple to temple."""
    height_share: float
    """Height of the box / height of the image."""
    unusable: str
    """Why it cannot be told whose face it is; "" if it can."""
    vector: np.ndarray | None
    """float32 [values]; None for an unusable face."""

    @property
    def framing(self) -> str:
        return next(name for name, share in FRAMINGS.items() if self.height_share >= share)

    def as_json(self) -> dict[str, Any]:
        vector = "" if self.vector is None else base64.b64encode(self.vector.astype("<f4").tobytes()).decode()
        return {"width_px": self.width_px, "height_share": self.height_share, "unusable": self.unusable, "vector": vector}

    @classmethod
    def from_json(cls, content: dict[str, Any], vector_size: int) -> "FoundFace":
        """Raises ValueError, KeyError or TypeError for what `as_json` did not return."""
        vector = None
        if not content["unusable"]:
            vector = np.frombuffer(base64.b64decode(content["vector"], validate=True), dtype="<f4").astype(np.float32)
            if vector.size != vector_size or not np.isfinite(vector).all():
                raise ValueError("vector")
        height_share = float(content["height_share"])
        if not height_share >= 0:
            raise ValueError("height_share")
        return cls(int(content["width_px"]), height_share, str(content["unusable"]), vector)


def find_faces(rgb: np.ndarray, model: FaceModel) -> list[FoundFace]:
    """The largest usable faces in an image, uint8 [height, width, 3], or the largest face if none is usable."""
    faces = model.detect(rgb)
    chosen = [face for face in faces if not why_unusable(rgb, face, model)] or faces[:1]
    found = []
    for face in [face for face in chosen if face.width >= MIN_SHARE_OF_LARGEST * chosen[0].width][:MAX_FACES]:
        unusable = why_unusable(rgb, face, model)
        vector = None if unusable else model.embed(rgb, face)
        found.append(FoundFace(round(face.width), round(face.height / rgb.shape[0], 4), unusable, vector))
    return found


class FaceCache:
    """The faces of every image by the SHA-256 of its file: one JSON line each, so that a killed run loses nothing."""

    def __init__(self, file: Path, model: str):
        self._file, self._model = file, model
        self._faces: dict[str, list[FoundFace]] = {}
        size = FACE_MODELS[model].vector_size
        for line in read_json_lines(file):
            try:
                if line["model"] == model:
                    self._faces[str(line["sha256"])] = [FoundFace.from_json(face, size) for face in line["faces"]]
            except (ValueError, KeyError, TypeError):  # a damaged line: the faces are searched again
                continue

    def get(self, sha256: str) -> list[FoundFace] | None:
        return self._faces.get(sha256)

    def add(self, sha256: str, faces: list[FoundFace]) -> None:
        self._faces[sha256] = faces
        append_json_line(self._file, {"model": self._model, "sha256": sha256, "faces": [face.as_json() for face in faces]})


@dataclass(frozen=True)
class Likeness:
    """Of one image, to the others of a data set and to the face references."""

    face: FoundFace | None
    """The one that was compared; None if no face was found."""
    score: float | None
    """None: it cannot be told."""
    to_reference: float | None
    """The highest similarity to a face reference; None if it cannot be told, or there is none."""
    why: str
    """Why there is no score; "" if there is one."""

    @property
    def framing(self) -> str:
        """A key of FRAMINGS, or "" if no face was found."""
        return self.face.framing if self.face else ""


def score_image(faces: Sequence[FoundFace], others: np.ndarray, references: np.ndarray, model: type[FaceModel]) -> Likeness:
    """The likeness of that face of an image which looks most like the `others`, [n, values]. `references`: [m, values]."""
    usable = [face for face in faces if face.vector is not None]
    if not usable:
        return Likeness(faces[0] if faces else None, None, None, faces[0].unusable if faces else NO_FACE)
    vectors = np.stack([face.vector for face in usable])
    scores = model.similarity(vectors, others).mean(axis=1) if len(others) >= MIN_FACES else None
    to_references = model.similarity(vectors, references).max(axis=1) if len(references) else None
    best = 0
    for known in (to_references, scores):
        best = best if known is None else int(known.argmax())
    return Likeness(
        usable[best],
        None if scores is None else float(scores[best]),
        None if to_references is None else float(to_references[best]),
        f"there are only {len(others)} other faces to compare with" if scores is None else "",
    )


def score_set(images: Mapping[str, Sequence[FoundFace]], references: np.ndarray, model: type[FaceModel]) -> dict[str, Likeness]:
    """The likeness of every image of a data set to the other images, of more than MOST_COMPARED to a part of them. Name -> faces;
    `references`: [m, values]."""
    nothing = np.empty((0, 1), dtype=np.float32)
    persons = {name: score_image(faces, nothing, references, model).face for name, faces in images.items()}
    vectors = {name: face.vector for name, face in persons.items() if face and face.vector is not None}
    compared = list(vectors)[:: math.ceil(len(vectors) / MOST_COMPARED) or 1]
    rows = {name: row for row, name in enumerate(compared)}
    known = np.stack([vectors[name] for name in compared]) if compared else nothing
    scored = {}
    for name, faces in images.items():
        others = np.delete(known, rows[name], axis=0) if name in rows else known
        scored[name] = score_image(faces, others, references, model)
    return scored
