"""A WD14-style ONNX tagger: images -> the probability of each of its tags."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from PIL import Image

from captioning.cpu_affinity import performance_cores, pinned_to
from captioning.tag_selection import DOWNLOAD_AGAIN, read_tags
from common.background import prefetch
from common.errors import ModelError, SettingsError
from common.images import BrokenImageError, open_rgb

ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
_FATAL = 4
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class Tagger:
    """A loaded model with its list of `tags`; every problem with either is a ModelError.

    `device` is "CPU" or "CUDA", `side_px` the side of the model's square input.
    """

    def __init__(self, model: Path, tags_file: Path, batch_size: int, provider: str = "cpu", bf16: bool = False, threads=None):
        """`batch_size` images are processed at once, unless the model has a fixed batch size; `threads` None is one on each
        performance core; for the rest see `open_session`."""
        self.tags = read_tags(tags_file)
        self._file = model
        cores = performance_cores() if threads is None else []
        self._first_core = cores[0] if cores else set()
        self._session = open_session(model, provider, bf16, threads or 0, cores)
        self.device = "CUDA" if _CUDA in self._session.get_providers() else "CPU"
        self._read_input(batch_size)
        shape = self._session.get_outputs()[0].shape
        width = shape[-1] if shape else None
        if isinstance(width, int) and width != len(self.tags):  # a width that the model leaves open is checked after a run
            raise ModelError(
                f"{tags_file}: lists {len(self.tags)} tags, but {model.name} gives {width} values per image; "
                "take both files from the same repository"
            )

    def _read_input(self, batch_size: int) -> None:
        """Name, layout, side and fixed batch size of the input, in all of which WD14 models differ."""
        entry = self._session.get_inputs()[0]
        batch, *sides = entry.shape if len(entry.shape) == 4 else (None, None, None, None)
        self._channels_first = sides[0] == 3 and sides[2] != 3
        height, width = sides[1:] if self._channels_first else sides[:2]
        if entry.type != "tensor(float)" or 3 not in (sides[0], sides[2]) or not isinstance(height, int) or height != width:
            raise ModelError(
                f"{self._file}: takes {entry.type} {entry.shape}, not float images [N, side, side, 3]; "
                "set CAPTION_MODEL to a WD14-style tagger"
            )
        self.side_px = height
        self._input = entry.name
        self.batch_size = batch if isinstance(batch, int) and batch > 0 else batch_size

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """N images float32 [side, side, 3] (see `preprocess`) -> float32 [N, tags], each value within 0..1."""
        batch = np.stack(images)
        if self._channels_first:
            batch = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
        starts = range(0, len(batch), self.batch_size)
        result = np.concatenate([self._run(batch[start : start + self.batch_size]) for start in starts])
        if result.shape != (len(batch), len(self.tags)):
            raise ModelError(
                f"{self._file}: gives values of shape {result.shape} for {len(batch)} images and {len(self.tags)} tags; "
                "take both files from the same repository"
            )
        if not (np.isfinite(result).all() and result.min() >= 0 and result.max() <= 1):
            raise ModelError(f"{self._file}: gives values that are not probabilities; set CAPTION_MODEL to a WD14-style tagger")
        return result

    def _run(self, part: np.ndarray) -> np.ndarray:
        # Always a full batch: other sizes use other kernels with other rounding errors, and the tags of an image must not
        # depend on the images beside it.
        missing = self.batch_size - len(part)
        full = np.pad(part, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else part
        try:
            return self.run_session(full)[: len(part)]
        except ORT_ERRORS as error:
            raise ModelError(
                f"{self._file}: failed with {' '.join(str(error).split())}; lower CAPTION_BATCH_SIZE if memory is short, "
                f"otherwise {DOWNLOAD_AGAIN}"
            ) from None

    def run_session(self, batch: np.ndarray) -> np.ndarray:
        """Run the model on one full batch in its own layout, without any checks."""
        with pinned_to(self._first_core):
            return self._session.run(None, {self._input: batch})[0]


def predict(paths: Sequence[Path], tagger: Tagger, workers: int) -> Iterator[tuple[Path, np.ndarray | BrokenImageError]]:
    """Each path with the probabilities of its image, float32 [tags], or with what is wrong with the image.

    All batches but the last are full, because broken images take no place in them. `workers` threads decode and preprocess
    images up to two batches ahead.
    """
    waiting: list[tuple[Path, np.ndarray]] = []

    def run_batch() -> Iterator[tuple[Path, np.ndarray]]:
        probabilities = tagger.probabilities([image for _, image in waiting])
        return zip([path for path, _ in waiting], probabilities, strict=True)

    for path, image in prefetch(lambda path: _load(path, tagger.side_px), paths, workers, ahead=2 * tagger.batch_size):
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
    images = [_load(path, tagger.side_px)[1] for path in paths[: tagger.batch_size]]
    return [image for image in images if isinstance(image, np.ndarray)]


def _load(path: Path, side_px: int) -> tuple[Path, np.ndarray | BrokenImageError]:
    try:
        return path, preprocess(open_rgb(path), side_px)
    except BrokenImageError as error:
        return path, error


def preprocess(image: Image.Image, side_px: int) -> np.ndarray:
    """An upright RGB image -> float32 [side, side, 3], BGR, 0..255: padded to a centred white square, then resized bicubically.

    This is what the models were trained on; another order or filter gives other tags.
    """
    edge = max(image.size)
    square = Image.new("RGB", (edge, edge), "white")
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    if edge != side_px:
        square = square.resize((side_px, side_px), Image.Resampling.BICUBIC)
    return np.asarray(square)[:, :, ::-1].astype(np.float32)


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
        raise ModelError(f"{model}: is cut off or not an ONNX model ({' '.join(str(error).split())}); {DOWNLOAD_AGAIN}") from None
    if provider == "cuda" and _CUDA not in session.get_providers():
        raise SettingsError("caption_provider: cuda does not start here (no GPU, or no CUDA and cuDNN libraries); set it to cpu")
    return session
