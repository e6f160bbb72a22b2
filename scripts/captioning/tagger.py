"""A WD14-style ONNX tagger: pictures -> the probability of each of its tags."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.cores import big_cores, kept_on
from captioning.session import ORT_ERRORS, one_line, open_session, runs_on
from captioning.tags_file import FETCH_AGAIN, read_tags
from errors import ModelError


class Tagger:
    """A loaded model with its tags; every problem with either is a ModelError."""

    def __init__(self, model: Path, tags_file: Path, batch_size: int, provider: str = "cpu", bf16: bool = False, threads=None):
        """Pictures go through the model `batch_size` at a time, unless the model has a fixed batch; `threads` None is one on
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
                f"{self._file}: takes {entry.type} {entry.shape}, not float pictures [N, side, side, 3]; "
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
                f"{tags_file}: lists {len(self.tags)} tags, but {self._file.name} gives {width} values per picture; "
                "take both files from the same repository"
            )

    def probabilities(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """N pictures float32 [side, side, 3] (see `prepare`) -> float32 [N, tags], each within 0..1."""
        batch = np.stack(prepared)
        if self._channels_first:
            batch = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
        starts = range(0, len(batch), self.batch_size)
        result = np.concatenate([self._run(batch[start : start + self.batch_size]) for start in starts])
        if result.shape != (len(batch), len(self.tags)):
            raise ModelError(
                f"{self._file}: gives values of shape {result.shape} for {len(batch)} pictures and {len(self.tags)} tags; "
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


def prepare(picture: Image.Image, side_px: int) -> np.ndarray:
    """An upright RGB picture -> float32 [side, side, 3], BGR, 0..255: padded to a centred white square, then bicubic.

    This is what the models were trained on; changing the order or the filter changes the tags.
    """
    edge = max(picture.size)
    square = Image.new("RGB", (edge, edge), "white")
    square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    if edge != side_px:
        square = square.resize((side_px, side_px), Image.Resampling.BICUBIC)
    return np.asarray(square)[:, :, ::-1].astype(np.float32)
