"""`python -m benchmarks.report`: how long the report page takes on one core, and how large it is. CPU only.

Builds the files that the stages leave for a data set and a run: images that the demo draws, and figures that are made up. The
page is written five times: for the first time where no stage has decoded any image, again with nothing changed, with one more row
of sample images, for the first time after the stages, which leave the thumbnails of the images that they decode, and for the first
time after a training run alone, which leaves those of the sample images.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from common.dataset_layout import DatasetFolder, select_images
from common.files import write_json
from common.images import open_rgb
from common.output_layout import OutputLayout
from common.thumbnails import SAMPLE_PX, Thumbnails
from demo.standin_comfyui.images import scene

REPORT = Path(__file__).parents[1] / "scripts" / "report.py"
NAME = "mira_woman"
EPOCHS_PER_SAVE, STEPS_PER_EPOCH = 2, 50
SCENES = ("portrait in a garden", "full body in a forest", "close-up in a studio", "half body on a beach", "portrait in the snow")
SAMPLE_PROMPTS = {
    NAME: "trigger",
    f"{NAME}, standing on a beach at sunset": "scene",
    f"{NAME}, in a snowy forest": "scene",
    "woman": "class",
}
FLOOR, CEILING = 0.31, 0.78
CHOSEN = 0.6
"""Of the saves: the recommended one."""


def build(folder: Path, images: int, saves: int, side_px: int) -> None:
    """Write everything that the stages would leave in `folder`, but with made-up figures."""
    face = scene("close portrait in a studio", 3, (384, 384)).crop((140, 50, 322, 290))
    build_dataset(DatasetFolder(folder / "dataset"), images, side_px, face)
    build_run(OutputLayout(folder / "output", NAME), saves, side_px, face)


def build_dataset(dataset: DatasetFolder, images: int, side_px: int, face) -> None:
    random, found, flagged = np.random.default_rng(0), {}, {}
    dataset.images.mkdir(parents=True)
    for number in range(images):
        text, name = SCENES[number % len(SCENES)], f"{number:04}.png"
        is_other = number in (3, 11)
        scene(text, number, (side_px, side_px), None if is_other else face).save(dataset.images / name)
        (dataset.images / name).with_suffix(".txt").write_text(f"{NAME}, 1girl, solo, {text}", encoding="utf-8")
        likeness = round(float(random.normal(0.33 if is_other else CEILING, 0.03)), 4)
        framing = "close" if "close" in text or "portrait" in text else "full" if "full" in text else "half"
        found[name] = {"likeness": likeness, "to_reference": likeness, "framing": framing, "face_px": 200, "why": ""}
        if is_other:
            what = f"the face is unlike the other images: likeness {likeness:.2f}, less than 0.46"
            flagged[name] = {"sha256": "", "flaws": {"another person": what}}
    framing = [each["framing"] for each in found.values()]
    shares = {name: round(framing.count(name) / images, 4) for name in ("close", "half", "full")}
    write_json(dataset.audit, {"flagged": flagged})
    write_json(dataset.likeness, {"ceiling": CEILING, "framing": shares, "images": found})
    write_json(dataset.traits, {"pruned": {"brown hair": 0.97}, "kept": {"brown eyes": 0.61, "freckles": 0.3}})


def build_run(outputs: OutputLayout, saves: int, side_px: int, face) -> None:
    random, steps = np.random.default_rng(1), saves * EPOCHS_PER_SAVE * STEPS_PER_EPOCH
    outputs.lora_dir.mkdir(parents=True)
    origins = "learning_rate = 5e-05  # set by environment\nlora_rank = 32"
    outputs.resolved_config.write_text(f'[train.optimizer]\n{origins}\n[train.saving]\noutput_name = "{NAME}"\n', encoding="utf-8")
    lines = []
    for step in range(steps):
        loss = 0.11 + 0.05 * np.exp(-step / 200) + random.normal(0, 0.02)
        lines.append({"step": step, "lr": 5e-5 * min(1, (step + 1) / 50), "loss": loss})
        if (step + 1) % STEPS_PER_EPOCH == 0:
            smoothed = 0.115 + 0.04 * np.exp(-step / 250)
            losses = {"validation_loss": smoothed + random.normal(0, 0.004), "validation_loss_smoothed": smoothed}
            lines.append({"step": step, **losses})
    outputs.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    history = {"event": "start", "time": "2026-11-26T09:00:00+00:00", "steps": steps, "device": "NVIDIA GB10 in bfloat16"}
    outputs.history.parent.mkdir(parents=True)
    outputs.history.write_text(json.dumps(history) + "\n", encoding="utf-8")
    chosen = max(1, int(saves * CHOSEN))
    for path in (outputs.lora, outputs.recommended, *(outputs.lora_after(save * EPOCHS_PER_SAVE) for save in range(1, saves))):
        save_file({"a": np.zeros(4, np.float16)}, path, {"modelspec.trigger_phrase": NAME})
    rows = [row(outputs, save, saves, side_px, face) for save in range(saves + 1)]
    scores = {strength: score_after(chosen, saves) - lack for strength, lack in ((0.6, 0.12), (0.8, 0.01), (1.0, 0.0))}
    strengths = [
        images_of(outputs, f"strength-{strength}", strength, score, side_px, face) | {"strength": strength}
        for strength, score in scores.items()
    ]
    means = {each["strength"]: statistics.mean(filter(None, each["likeness"])) for each in strengths}
    reason = (
        f"Its likeness, {means[1.0]:.3f}, is the best. 0.8 is the lowest strength whose likeness, {means[0.8]:.3f}, is within one "
        f"standard error of that at 1, {means[1.0]:.3f}."
    )
    record = {
        "prompts": [{"text": text, "kind": kind} for text, kind in SAMPLE_PROMPTS.items()],
        "rows": rows,
        "floor": FLOOR,
        "ceiling": CEILING,
        "strengths": strengths,
        "recommended": {"file": rows[chosen]["file"], "strength": 0.8, "reason": reason},
    }
    write_json(outputs.samples_record, record)


def row(outputs: OutputLayout, save: int, saves: int, side_px: int, face) -> dict:
    """The row of samples.json after so many saves; 0 is the base model."""
    epochs = save * EPOCHS_PER_SAVE
    file = outputs.lora if save == saves else outputs.lora_after(epochs)
    label = "base model" if save == 0 else "final" if save == saves else f"after epoch {epochs}"
    learned = 1 - np.exp(-2.5 * save / saves)
    content = images_of(outputs, f"{epochs:06}", learned, score_after(save, saves), side_px, face)
    return content | {"label": label, "file": file.name if save else None, "step": epochs * STEPS_PER_EPOCH, "epochs": epochs}


def score_after(save: int, saves: int) -> float:
    """The likeness of the first sample image after so many saves: it is best after CHOSEN of them."""
    return FLOOR + (1 - np.exp(-5 * save / saves)) * (0.72 - FLOOR) - 0.2 * max(0, save / saves - CHOSEN)


def images_of(outputs: OutputLayout, stem: str, learned: float, score: float, side_px: int, face) -> dict:
    """Draw one image for each prompt; the more is `learned`, the more the person is that of the data set."""
    outputs.samples.mkdir(parents=True, exist_ok=True)
    images, scores, reasons = [], [], []
    for number, (text, kind) in enumerate(SAMPLE_PROMPTS.items()):
        images.append(f"{stem}-{number + 1:02}.png")
        is_person = kind != "class" and learned > 0.3
        scene(text, number, (side_px, side_px), face if is_person else None).save(outputs.samples / images[-1])
        scores.append(None if kind == "class" else round(score - 0.02 * number, 4))
        reasons.append("it shows no face of at least 64 px" if kind == "class" else "")
    return {"images": images, "likeness": scores, "unscored": reasons}


def report(folder: Path) -> float:
    """Write the page; returns the seconds of CPU time that it took, which other programs on the machine hardly change."""
    folders = {"DATASET_DIR": str(folder / "dataset"), "OUTPUT_DIR": str(folder / "output"), "TRIGGER_WORD": NAME}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, REPORT, "--config", os.devnull]
    subprocess.run(command, env={"PATH": os.environ["PATH"], **folders}, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/loracat-benchmark-report"), help="where everything is built")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--side", type=int, default=1024, help="pixels of a side of every image")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    build(options.folder, options.images, options.saves, options.side)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    outputs = OutputLayout(options.folder / "output", NAME)
    first, second = report(options.folder), report(options.folder)
    record = json.loads(outputs.samples_record.read_bytes())
    new = images_of(outputs, "new", 1.0, 0.7, options.side, scene("close portrait", 5, (384, 384)))
    write_json(outputs.samples_record, record | {"rows": [*record["rows"], record["rows"][-1] | new]})
    third = report(options.folder)
    shutil.rmtree(outputs.thumbnails)
    dataset = DatasetFolder(options.folder / "dataset")
    for image in select_images(dataset).images:
        Thumbnails(dataset.thumbnails).add(image.path, open_rgb(image.path))
    for path in outputs.samples.glob("*.png"):
        Thumbnails(outputs.thumbnails).add(path, open_rgb(path), SAMPLE_PX)
    fourth = report(options.folder)
    shutil.rmtree(dataset.thumbnails)
    fifth = report(options.folder)
    size = outputs.report.stat().st_size / 1e6
    print(f"{options.images} images, {options.saves} saves of {len(SAMPLE_PROMPTS)} sample images, {options.side} px, one core")
    print(
        f"CPU time: first page {first:.1f} s, unchanged {second:.2f} s, with one more row {third:.2f} s; first page after all "
        f"stages {fourth:.2f} s, after training alone {fifth:.1f} s; {size:.1f} MB; {outputs.report}"
    )


if __name__ == "__main__":
    main()
