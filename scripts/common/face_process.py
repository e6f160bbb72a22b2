"""Find the faces of image files in a process of its own, with the lowest priority, so that no other work is slowed down.

The process reads a path from every line of standard input, as JSON, and answers with a line of JSON. It ends with its input,
also if its parent was killed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

import numpy as np

from common.errors import LoracatError, ModelError, as_loracat_error
from common.faces import FACE_MODELS, FaceModel, MissingWeightsError, download_weights, load_face_model
from common.images import BrokenImageError, open_rgb
from common.likeness import FoundFace, find_faces

NICENESS = 19
_SCRIPTS = Path(__file__).parents[1]


class FaceProcess:
    """The process, as its parent sees it."""

    def __init__(self, process: subprocess.Popen, model: str):
        self._process, self._model = process, FACE_MODELS[model]
        self.pid = process.pid

    def find(self, image: Path) -> list[FoundFace]:
        """The faces in an image file; see `find_faces`. [] also if the image cannot be read.

        Raises ModelError if the face model cannot be downloaded or loaded, or the process has ended.
        """
        try:
            self._process.stdin.write(json.dumps(str(image.absolute())).encode() + b"\n")
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):  # a closed pipe, or an incomplete line
            raise ModelError("the process that finds faces has ended; run the stage again") from None
        if "problem" in answer:
            raise ModelError(answer["problem"])
        return [FoundFace.from_json(face, self._model.vector_size) for face in answer["faces"]]


@contextmanager
def face_process(model: str, models_dir: Path) -> Iterator[FaceProcess]:
    """The process for the face model with that name. Leaving the block ends it, even while another thread waits for it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "common.face_process", model, str(models_dir.absolute())],
        cwd=_SCRIPTS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,  # Ctrl-C is for the parent alone
    )
    try:
        yield FaceProcess(process, model)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def main(name: str, models_dir: Path) -> None:
    os.nice(NICENESS)
    model: FaceModel | None = None
    for line in sys.stdin:
        try:
            model = model or _load(name, models_dir)
            faces = []
            with suppress(BrokenImageError):
                faces = find_faces(np.asarray(open_rgb(Path(json.loads(line)))), model)
            answer = {"faces": [face.as_json() for face in faces]}
        except LoracatError as error:
            answer = {"problem": str(error)}
        except MemoryError:
            answer = {"problem": f"out of memory while faces are searched in {line.strip()}"}
        except OSError as error:  # a full disk, or a folder that may not be written to
            answer = {"problem": str(as_loracat_error(error) or error)}
        try:
            print(json.dumps(answer), flush=True)
        except BrokenPipeError:  # the parent was killed
            os._exit(1)


def _load(name: str, models_dir: Path) -> FaceModel:
    """The face model, whose weights are downloaded once."""
    try:
        return load_face_model(name, models_dir)
    except MissingWeightsError:
        with redirect_stdout(sys.stderr):  # the parent reads answers only from standard output
            download_weights(name, models_dir)
        return load_face_model(name, models_dir)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
