"""`python -m benchmarks.caption`: how much of decoding and preprocessing images captioning hides behind inference. CPU only.

Builds two taggers with random weights and images of 1024 x 1024 px in a folder, and compares three things on this
machine: ONNX Runtime alone in a loop over ready tensors, decoding and preprocessing alone on one thread, and captioning as
scripts/caption_images.py does it, from the files to the cached probabilities. The ratios hold elsewhere, the times do not.
"""

import argparse
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from benchmarks import random_vit
from captioning.cpu_affinity import decode_workers
from captioning.image_audit import IndexedImage, index_images
from captioning.report import CaptionCounts
from captioning.tag_cache import infer, open_cache
from captioning.wd14 import Tagger, preprocess
from common.dataset_layout import DatasetFolder, find_images
from common.images import open_rgb

SIDE_PX = 1024
BATCH = 8
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")


@dataclass(frozen=True)
class Times:
    """Seconds for all images, once each."""

    bare: float
    preprocessing: float
    captioning: float

    @property
    def share_of_bare(self) -> float:
        return self.bare / self.captioning

    @property
    def hidden(self) -> float:
        """Share of the preprocessing that costs no time."""
        return 1 - (self.captioning - self.bare) / self.preprocessing


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.caption", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/loracat-benchmark-caption"), help="where everything is built")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--threads", type=int, default=None, help="inference threads; default: as captioning chooses them")
    parser.add_argument("--workers", type=int, default=decode_workers(), help="threads that preprocess images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("large", "small"), default=None)
    options = parser.parse_args()
    dataset = DatasetFolder(options.folder / "dataset")
    draw(dataset.images, options.images)
    images = find_images(dataset.images)[: options.images]
    begin = time.perf_counter()
    indexed = index_images(dataset, images, options.workers)
    print(
        f"checking {len(images)} images for the audit: {time.perf_counter() - begin:.1f} s (0 if it was done before)",
        flush=True,
    )
    print("\n| model | images | bare, s/image | preprocessing, s/image | captioning, s/image | of bare speed | hidden |")
    print("|---|---|---|---|---|---|---|")
    for name, size in (("large", random_vit.LARGE), ("small", random_vit.SMALL)):
        if options.only in (None, name):
            model = random_vit.build(options.folder / name, size)
            tagger = Tagger(model / "model.onnx", model / "selected_tags.csv", BATCH, "cpu", threads=options.threads)
            rounds = [measured(tagger, model, dataset, indexed, options.workers) for _ in range(options.rounds)]
            print(row(name, rounds, len(images)), flush=True)


def measured(tagger: Tagger, model: Path, dataset: DatasetFolder, indexed: dict[Path, IndexedImage], workers: int) -> Times:
    """One round of all three, so that the state of the machine is the same for each."""
    paths = list(indexed)
    ready = [preprocess(open_rgb(path), tagger.side_px) for path in paths[:BATCH]]
    tensor = np.stack(ready)
    run = tagger.run_session
    run(tensor)

    begin = time.perf_counter()
    for _ in range(0, len(paths), BATCH):
        run(tensor)
    bare = time.perf_counter() - begin

    begin = time.perf_counter()
    for path in paths:
        preprocess(open_rgb(path), tagger.side_px)
    preprocessing = time.perf_counter() - begin

    shutil.rmtree(dataset.tag_cache, ignore_errors=True)
    cache = open_cache(dataset.tag_cache, str(model), model, bf16=False)
    begin = time.perf_counter()
    found = infer(indexed, tagger, cache, CaptionCounts(), workers)
    captioning = time.perf_counter() - begin
    assert len(found) == len(paths)
    return Times(bare, preprocessing, captioning)


def row(name: str, rounds: list[Times], images: int) -> str:
    bare, preprocessing, captioning = (
        statistics.median(getattr(times, part) for times in rounds) / images for part in ("bare", "preprocessing", "captioning")
    )
    of_bare = statistics.median(times.share_of_bare for times in rounds)
    hidden = statistics.median(times.hidden for times in rounds)
    return f"| {name} | {images} | {bare:.4f} | {preprocessing:.4f} | {captioning:.4f} | {of_bare:.1%} | {hidden:.0%} |"


def draw(folder: Path, count: int) -> None:
    """Write photographs, each rotated by another angle, as the PNG files that ComfyUI would write."""
    folder.mkdir(parents=True, exist_ok=True)
    photographs = [Image.open(Path(skimage.data.__file__).parent / name).convert("RGB") for name in PHOTOGRAPHS]
    for number in range(count):
        path = folder / f"{number:04}.png"
        if not path.exists():
            turned = photographs[number % len(photographs)].rotate(number // len(photographs), Image.Resampling.BICUBIC)
            turned.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).save(path, compress_level=4)


if __name__ == "__main__":
    main()
