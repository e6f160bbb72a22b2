"""A WD14-style ONNX tagger: images -> the probability of each of its tags.

ONNX Runtime: which processor runs the model, with how many threads, and what goes wrong, in our words.

Images -> probabilities: while the model works on one batch, threads decode and prepare the next ones.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from PIL import Image

from captioning.cpu_affinity import big_cores, kept_on
from captioning.tag_selection import FETCH_AGAIN, TagChoice, read_tags
from common.background import prefetch
from common.errors import ModelError, SettingsError
from common.images import BrokenImageError, open_rgb


class Tagger:
    """A loaded model with its tags; every problem with either is a ModelError."""

    def __init__(self, model: Path, tags_file: Path, batch_size: int, provider: str = "cpu", bf16: bool = False, threads=None):
        """Images go through the model `batch_size` at a time, unless the model has a fixed batch; `threads` None is one on
        each big core; for the rest see `session.open_session`."""
        self.tags = read_tags(tags_file)
        self._file = model
        cores = big_cores() if threads is None else []
        self._first_core = cores[0] if cores else set()
        self._session = open_session(model, provider, bf16, threads or 0, cores)
        self.runs_on = runs_on(self._session)
        self._read_input(batch_size)
        self._check_width(self._session.get_outputs()[0].shape, tags_file)

    def _read_input(self, batch_size: int) -> None:
        """Name, layout, size and fixed batch of the input, from the session: WD14 models differ in all of them."""
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

    def _check_width(self, shape: list, tags_file: Path) -> None:
        """One output per row of the tags file; a size that the model leaves open is checked when it has run."""
        width = shape[-1] if shape else None
        if isinstance(width, int) and width != len(self.tags):
            raise ModelError(
                f"{tags_file}: lists {len(self.tags)} tags, but {self._file.name} gives {width} values per image; "
                "take both files from the same repository"
            )

    def probabilities(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """N images float32 [side, side, 3] (see `prepare`) -> float32 [N, tags], each within 0..1."""
        batch = np.stack(prepared)
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

    def session_run(self, batch: np.ndarray) -> np.ndarray:
        """One full batch, in the model's layout, through the model and nothing else."""
        with kept_on(self._first_core):
            return self._session.run(None, {self._input: batch})[0]

    def _run(self, part: np.ndarray) -> np.ndarray:
        """Always a full batch: other sizes take other kernels with other roundings, and tags must not depend on company."""
        missing = self.batch_size - len(part)
        filled = np.pad(part, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else part
        try:
            return self.session_run(filled)[: len(part)]
        except ORT_ERRORS as error:
            raise ModelError(
                f"{self._file}: stopped with {one_line(error)}; lower CAPTION_BATCH_SIZE if memory is short, else {FETCH_AGAIN}"
            ) from None


def prepare(image: Image.Image, side_px: int) -> np.ndarray:
    """An upright RGB image -> float32 [side, side, 3], BGR, 0..255: padded to a centred white square, then bicubic.

    This is what the models were trained on; changing the order or the filter changes the tags.
    """
    edge = max(image.size)
    square = Image.new("RGB", (edge, edge), "white")
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    if edge != side_px:
        square = square.resize((side_px, side_px), Image.Resampling.BICUBIC)
    return np.asarray(square)[:, :, ::-1].astype(np.float32)


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


_ONLY_FATAL = 4


_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def open_session(
    model: Path, provider: str, bf16: bool = False, threads: int = 0, cores: Sequence[set[int]] = ()
) -> onnxruntime.InferenceSession:
    """The model, ready to run. `provider` is "auto", "cpu" or "cuda"; "auto" takes CUDA if the installed runtime has it.

    `bf16` lets matrix products on ARM CPUs round their factors to bfloat16. With `cores` (see cores.big_cores) there is a
    thread for each, and it stays there: on the first one the thread that runs the session, which is for the caller to see to.
    Without, there are as many as `threads`; 0 is ONNX Runtime's own choice, one for each physical core.
    Raises ModelError for a file that is no model, SettingsError for CUDA that is not there.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ONLY_FATAL  # errors are raised, and said in our words
    options.intra_op_num_threads = len(cores) or threads
    if len(cores) > 1:
        options.add_session_config_entry("session.intra_op_thread_affinities", _affinities(cores[1:]))
    if bf16:
        options.add_session_config_entry("mlas.enable_gemm_fastmath_arm64_bfloat16", "1")
    try:
        session = onnxruntime.InferenceSession(model, options, providers=_providers(provider))
    except ORT_ERRORS as error:
        raise ModelError(f"{model}: is cut off or no ONNX model ({one_line(error)}); {FETCH_AGAIN}") from None
    if provider == "cuda" and _CUDA not in session.get_providers():
        raise SettingsError("caption_provider: cuda does not start here (no GPU, or no CUDA and cuDNN libraries); set it to cpu")
    return session


def runs_on(session: onnxruntime.InferenceSession) -> str:
    """`CUDA` or `CPU`, for the log."""
    return "CUDA" if _CUDA in session.get_providers() else "CPU"


def one_line(error: Exception) -> str:
    """The message without its line breaks."""
    return " ".join(str(error).split())


def _affinities(cores: Sequence[set[int]]) -> str:
    """One entry per thread, in ONNX Runtime's numbers of processors, which begin at 1."""
    return ";".join(",".join(str(cpu + 1) for cpu in sorted(core)) for core in cores)


def _providers(provider: str) -> list[str]:
    has_cuda = _CUDA in onnxruntime.get_available_providers()
    if provider == "cuda" and not has_cuda:
        raise SettingsError(
            "caption_provider: cuda needs the package onnxruntime-gpu, and onnxruntime without a GPU is installed; "
            "set it to cpu, or install onnxruntime-gpu in its place"
        )
    if provider == "cpu" or not has_cuda:
        return [_CPU]
    onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed
    return [_CUDA, _CPU]


Prepared = np.ndarray | BrokenImageError


def inferred(paths: Sequence[Path], tagger: Tagger, workers: int) -> Iterator[tuple[Path, np.ndarray | BrokenImageError]]:
    """Each path with its image's probabilities, float32 [tags], or with what is wrong with the image.

    Batches are full but for the last one: broken images leave no gaps. `workers` threads stay two batches ahead.
    """
    waiting: list[tuple[Path, np.ndarray]] = []
    for path, prepared in prefetch(lambda path: _prepared(path, tagger.side_px), paths, workers, ahead=2 * tagger.batch_size):
        if isinstance(prepared, BrokenImageError):
            yield path, prepared
            continue
        waiting.append((path, prepared))
        if len(waiting) == tagger.batch_size:
            yield from _probabilities(waiting, tagger)
            waiting = []
    if waiting:
        yield from _probabilities(waiting, tagger)


def first_batch(paths: Sequence[Path], tagger: Tagger) -> list[np.ndarray]:
    """The first images that can be decoded, prepared, at most a batch of them."""
    prepared = [_prepared(path, tagger.side_px)[1] for path in paths[: tagger.batch_size]]
    return [image for image in prepared if isinstance(image, np.ndarray)]


def effect_on_tags(exact: np.ndarray, rounded: np.ndarray, choice: TagChoice) -> str:
    """What rounding does to the tags of a few images; both are probabilities [images, tags] of the same ones."""
    chosen = [(set(choice.chosen(one)), set(choice.chosen(other))) for one, other in zip(exact, rounded, strict=True)]
    changed = sum(len(one ^ other) for one, other in chosen)
    of_all = sum(len(one) for one, _ in chosen)
    moved = float(np.abs(exact - rounded).max(initial=0.0))
    return (
        f"bfloat16 changes {changed} of {of_all} tags of the first {len(exact)} images; probabilities move by at most {moved:.4f}"
    )


def _probabilities(waiting: list[tuple[Path, np.ndarray]], tagger: Tagger) -> Iterator[tuple[Path, np.ndarray]]:
    of_batch = tagger.probabilities([prepared for _, prepared in waiting])
    for (path, _), of_image in zip(waiting, of_batch, strict=True):
        yield path, of_image


def _prepared(path: Path, side_px: int) -> tuple[Path, Prepared]:
    try:
        return path, prepare(open_rgb(path), side_px)
    except BrokenImageError as error:
        return path, error
