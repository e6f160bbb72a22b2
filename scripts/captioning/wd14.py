"""A WD14-style ONNX tagger: images -> the probability of each of its tags."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from PIL import Image

from captioning.cpu_affinity import performance_cores, pinned_to
from captioning.onnx_file import read_onnx
from captioning.preprocessing import Preprocessing, find_preprocessing, image_layout, wd14
from captioning.tag_selection import DOWNLOAD_AGAIN, read_tags
from common.background import prefetch
from common.errors import ModelError, SettingsError
from common.images import BrokenImageError, open_rgb

ORT_ERRORS = (
    ort_errors.EPFail,
    ort_errors.EngineError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotFound,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
_FATAL = 4
_INPUT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
_NEWER = re.compile(
    r"Opset \d+ is under development|Unsupported model IR version: \d+|No Op registered for \w+|\S+ is not a registered function/op"
    r"|Could not find an implementation for \w+\(\d+\)"
)
"""What ONNX Runtime says about models of versions that it does not know."""
_OUTPUT_TYPES = ("tensor(float)", "tensor(float16)", "tensor(double)")
_OUTPUT_NAMES = (("probabilities", "probs", "prediction", "predictions", "predictions_sigmoid"), ("output",))
"""What the output with the probabilities is called where there are others beside it: embeddings, logits, first guesses."""
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class Tagger:
    """A loaded model with its list of `tags`; every problem with either is a ModelError.

    `device` is "CPU" or "CUDA", `preprocessing` makes the model's input of an image, `side_px` is the side of that.
    """

    def __init__(self, model: Path, tags_file: Path, batch_size: int, provider: str = "cpu", bf16: bool = False, threads=None):
        """`batch_size` images are processed at once, unless the model has a fixed batch size; `threads` None is one on each
        performance core; for the rest see `open_session`."""
        self.tags = read_tags(tags_file)
        self._file = model
        cores = performance_cores() if threads is None else []
        self._first_core = cores[0] if cores else set()
        onnx = read_onnx(model)
        self.preprocessing = find_preprocessing(onnx, len(self.tags))
        self.side_px = self.preprocessing.side_px
        self._channels_first = image_layout(onnx)[0]
        try:
            self._session = open_session(model, provider, bf16, threads or 0, cores)
        except ModelError:
            if onnx.weights_files:
                files = ", ".join(sorted(onnx.weights_files))[:200]
                raise ModelError(
                    f"{model}: does not fit its weights in {files}, or one of the files is cut off; delete them and run again to "
                    "download them, or put complete copies there"
                ) from None
            raise
        self.device = "CUDA" if _CUDA in self._session.get_providers() else "CPU"
        self._read_input(batch_size)
        self._output = self._find_output(tags_file)

    def _read_input(self, batch_size: int) -> None:
        """Name, type and fixed batch size of the input, in all of which models differ."""
        entry = self._session.get_inputs()[0]
        self._type = _INPUT_TYPES.get(entry.type)
        if self._type is None or (self._type is np.uint8 and not self.preprocessing.gives_whole_levels):
            raise ModelError(
                f"{self._file}: takes {entry.type} {entry.shape}, not float images [N, side, side, 3]; "
                "set CAPTION_MODEL to a WD14-style tagger"
            )
        self._input = entry.name
        self.batch_size = entry.shape[0] if isinstance(entry.shape[0], int) and entry.shape[0] > 0 else batch_size

    def _find_output(self, tags_file: Path) -> str:
        """The output with one probability for each tag. Of several, the one that is named so, or else the only one whose values
        are probabilities. A width that the model leaves open is checked after a run."""
        outputs = {output.name: output.shape[1] for output in self._session.get_outputs() if _may_be_probabilities(output)}
        fitting = [name for name, width in outputs.items() if width == len(self.tags)]
        fitting = fitting or [name for name, width in outputs.items() if not isinstance(width, int)]
        for names in _OUTPUT_NAMES:
            if len(named := [name for name in fitting if name.lower() in names]) == 1:
                return named[0]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            noise = np.random.default_rng(0).integers(0, 256, (self.side_px, self.side_px, 3)).astype(np.uint8)
            batch = self._as_input([self.preprocessing(Image.fromarray(noise))])
            values = self._run_checked(fitting, batch)
            likely = [name for name, value in zip(fitting, values, strict=True) if _are_probabilities(value)]
            if len(likely) == 1:
                return likely[0]
            raise ModelError(
                f"{self._file}: gives {', '.join(fitting)[:200]}, and which of them holds the tags' probabilities is not clear; "
                "set CAPTION_MODEL to a WD14-style tagger"
            )
        widths = ", ".join(f"{output.name} {output.shape}" for output in self._session.get_outputs())
        if len(outputs) == 1:
            raise ModelError(
                f"{tags_file}: lists {len(self.tags)} tags, but {self._file.name} gives {next(iter(outputs.values()))} values per "
                "image; take both files from the same repository"
            )
        raise ModelError(
            f"{tags_file}: lists {len(self.tags)} tags, and no output of {self._file.name} has that many values per image "
            f"({widths[:200]}); take both files from one repository, or set CAPTION_MODEL to a WD14-style tagger"
        )

    def _as_input(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images as the model takes them. Always a full batch: other sizes use other kernels with other rounding errors, and the
        tags of an image must not depend on the images beside it."""
        batch = np.stack(images).astype(self._type, copy=False)
        if self._channels_first:
            batch = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
        missing = self.batch_size - len(batch)
        return np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else batch

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """N images float32 [side, side, 3] (see `preprocessing`) -> float32 [N, tags], each value within 0..1."""
        starts = range(0, len(images), self.batch_size)
        result = np.concatenate([self._run(images[start : start + self.batch_size]) for start in starts])
        if result.shape != (len(images), len(self.tags)):
            raise ModelError(
                f"{self._file}: gives values of shape {result.shape} for {len(images)} images and {len(self.tags)} tags; "
                "take both files from the same repository"
            )
        if "logit" in self._output.lower() and np.isfinite(result).all() and not _are_probabilities(result):
            result = 1 / (1 + np.exp(-np.clip(result, -80, 80)))
        elif "logit" in self._output.lower() or not _are_probabilities(result):
            raise ModelError(f"{self._file}: gives values that are not probabilities; set CAPTION_MODEL to a WD14-style tagger")
        return result

    def _run(self, images: Sequence[np.ndarray]) -> np.ndarray:
        (result,) = self._run_checked([self._output], self._as_input(images))
        return result[: len(images)].astype(np.float32, copy=False)

    def _run_checked(self, outputs: list[str], batch: np.ndarray) -> list[np.ndarray]:
        try:
            return self.run_session(batch, outputs)
        except ORT_ERRORS as error:
            raise ModelError(
                f"{self._file}: failed with {' '.join(str(error).split())}; lower CAPTION_BATCH_SIZE if memory is short, "
                f"otherwise {DOWNLOAD_AGAIN}"
            ) from None

    def run_session(self, batch: np.ndarray, outputs: list[str] | None = None) -> list[np.ndarray]:
        """Run the model on one full batch in its own layout, without any checks; by default for all outputs."""
        with pinned_to(self._first_core):
            return self._session.run(outputs, {self._input: batch})


def _may_be_probabilities(output: onnxruntime.NodeArg) -> bool:
    return output.type in _OUTPUT_TYPES and len(output.shape) == 2


def _are_probabilities(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1)


def predict(paths: Sequence[Path], tagger: Tagger, workers: int) -> Iterator[tuple[Path, np.ndarray | BrokenImageError]]:
    """Each path with the probabilities of its image, float32 [tags], or with what is wrong with the image.

    All batches but the last are full, because broken images take no place in them. `workers` threads decode and preprocess
    images up to two batches ahead.
    """
    waiting: list[tuple[Path, np.ndarray]] = []

    def run_batch() -> Iterator[tuple[Path, np.ndarray]]:
        probabilities = tagger.probabilities([image for _, image in waiting])
        return zip([path for path, _ in waiting], probabilities, strict=True)

    for path, image in prefetch(lambda path: _load(path, tagger.preprocessing), paths, workers, ahead=2 * tagger.batch_size):
        if isinstance(image, BrokenImageError):
            yield path, image
            continue
        waiting.append((path, image))
        if len(waiting) == tagger.batch_size:
            yield from run_batch()
            waiting.clear()
    if waiting:
        yield from run_batch()


def first_batch(paths: Sequence[Path], tagger: Tagger) -> list[np.ndarray]:
    """The first images of `paths`, preprocessed: at most a batch of them, without those that cannot be decoded."""
    images = [_load(path, tagger.preprocessing)[1] for path in paths[: tagger.batch_size]]
    return [image for image in images if isinstance(image, np.ndarray)]


def _load(path: Path, preprocessing: Preprocessing) -> tuple[Path, np.ndarray | BrokenImageError]:
    try:
        return path, preprocessing(open_rgb(path))
    except BrokenImageError as error:
        return path, error


def preprocess(image: Image.Image, side_px: int) -> np.ndarray:
    """An upright RGB image -> float32 [side, side, 3], BGR, 0..255, as WD14's models take it."""
    return wd14(side_px)(image)


def open_session(
    model: Path, provider: str, bf16: bool = False, threads: int = 0, cores: Sequence[set[int]] = ()
) -> onnxruntime.InferenceSession:
    """Load the model. `provider` is "auto", "cpu" or "cuda"; "auto" uses CUDA if the installed runtime has it.

    `bf16` lets matrix products on ARM CPUs round their factors to bfloat16. With `cores` (see `performance_cores`) the
    session has one thread for each core, pinned to it; the thread of the first core is the one that runs the session, which
    the caller pins. Without, it has `threads` threads; 0 is ONNX Runtime's choice, one for each physical core.
    Raises ModelError for a file that is not a model, SettingsError if CUDA is requested and not available.
    """
    if provider == "cuda" and _CUDA not in onnxruntime.get_available_providers():
        raise SettingsError(
            "caption_provider: cuda needs the package onnxruntime-gpu, and onnxruntime without GPU support is installed; "
            "set it to cpu, or install onnxruntime-gpu instead"
        )
    providers = [_CPU]
    if provider != "cpu" and _CUDA in onnxruntime.get_available_providers():
        onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed
        providers = [_CUDA, _CPU]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL  # errors are raised, and reported by the caller
    options.intra_op_num_threads = len(cores) or threads
    if len(cores) > 1:
        # One entry for each thread but the caller's. ONNX Runtime counts processors from 1.
        pinned = ";".join(",".join(str(cpu + 1) for cpu in sorted(core)) for core in cores[1:])
        options.add_session_config_entry("session.intra_op_thread_affinities", pinned)
    if bf16:
        options.add_session_config_entry("mlas.enable_gemm_fastmath_arm64_bfloat16", "1")
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except ORT_ERRORS as error:
        reason = " ".join(str(error).split())
        if newer := _NEWER.search(reason):
            raise ModelError(
                f"{model}: needs a newer ONNX Runtime than {onnxruntime.__version__} ({newer[0]}); update the package onnxruntime, "
                "or set another CAPTION_MODEL"
            ) from None
        raise ModelError(f"{model}: is cut off or not an ONNX model ({reason}); {DOWNLOAD_AGAIN}") from None
    if provider == "cuda" and _CUDA not in session.get_providers():
        raise SettingsError("caption_provider: cuda does not start here (no GPU, or no CUDA and cuDNN libraries); set it to cpu")
    return session
