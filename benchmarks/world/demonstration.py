"""The whole pipeline once, as a user runs it: `run.sh --caption --train`, with the samples that it makes itself."""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.world.artist import Artist
from benchmarks.world.measures import ALONE, CLASS, COUNTS, SCENE, Judge, render
from benchmarks.world.picks import sampled_saves
from benchmarks.world.recipes import Arm
from benchmarks.world.runs import Run
from common.settings import REPOSITORY

ARM = Arm("demonstration", {"SAMPLES": "true"}, images=30, saves=4)
SHOWN = {ALONE: 4, SCENE: 6, CLASS: 2}
"""Samples of each kind in a row of the sheet."""


def demonstrate(run: Run, sheet_path: Path | None, counts: Mapping[str, int] = COUNTS) -> int:
    """Draw a data set, run the stages on it, print what their samples show; returns the exit code of run.sh."""
    shutil.rmtree(run.output, ignore_errors=True)
    run.world.write_models()
    run.subject.write_images(run.dataset, run.arm.images)
    variables = run.variables() | {"PYTHON": sys.executable}
    code = subprocess.run([REPOSITORY / "scripts" / "run.sh", "--caption", "--train"], env=variables).returncode
    if code:
        return code
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    artist = Artist(run.world.model, run.world.side, device)
    judge = Judge(run.subject, artist, run.world.reader(device), counts)
    print(f"the person as drawn: distance {judge.drawn['distance_alone']:.3f}; the base model: {judge.base['distance_alone']:.3f}")
    for save in sampled_saves(run, judge):
        print(f"{save.file}: its own samples are {2 * (1 - np.mean(save.scores)):.3f} from the person")
    rows = [render(artist, judge.prompts, "")]
    for epochs, path in run.saves().items():
        with artist.with_lora(path):
            rows.append(render(artist, judge.prompts, run.subject.trigger))
        print(f"after {epochs} epochs: {', '.join(f'{name} {value:.3f}' for name, value in judge.measure(rows[-1]).items())}")
    if sheet_path:
        sheet(judge, rows).save(sheet_path)
    return 0


def sheet(judge: Judge, rows: list[torch.Tensor]) -> Image.Image:
    """The data set in the first row, then the same samples of each model."""
    columns = [
        index
        for kind, count in SHOWN.items()
        for index in [number for number, prompt in enumerate(judge.prompts) if prompt.kind == kind][:count]
    ]
    drawn = judge.shown[[number % len(judge.shown) for number in range(len(columns))]]
    images = torch.cat([drawn.cpu(), *(row[columns].cpu() for row in rows)])
    pixels = (images * 255).round().to(torch.uint8).unflatten(0, (-1, len(columns))).permute(0, 3, 1, 4, 2)
    return Image.fromarray(np.ascontiguousarray(pixels.flatten(0, 1).flatten(1, 2).numpy()))
