"""The experiments on drawn people: their data sets, what renders and reads for them, the scheduler, and the statistics."""

import csv
import os
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.world.artist import Artist
from benchmarks.world.learn import rate_of
from benchmarks.world.measures import COUNTS, Judge, prompts_of
from benchmarks.world.people import ALL_TAGS
from benchmarks.world.picks import stopped_after
from benchmarks.world.reader import Reader, built
from benchmarks.world.recipes import ROUNDS, Arm
from benchmarks.world.report import at_equal_likeness, comparison, interval, picks
from benchmarks.world.runs import Run, World, runs_of
from benchmarks.world.scheduler import Job, Limits, run_jobs
from benchmarks.world.subjects import UNSEEN, subject
from benchmarks.world.tagger import write_tagger
from captioning.wd14 import Tagger
from common.dataset_layout import DatasetFolder
from common.files import read_json_lines, write_json
from common.settings import REPOSITORY
from training.config import LoraSettings
from training.method.adapters import inject
from training.method.export import write_lora
from training.models.base_model import find_base
from training.models.weights import load_unet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def artist(tiny_sdxl) -> Artist:
    return Artist(tiny_sdxl, 64, CPU)


@pytest.fixture(scope="module")
def reader() -> Reader:
    """It has learned nothing, but answers."""
    torch.manual_seed(0)
    return Reader(built(64), 64, CPU)


@pytest.mark.parametrize("is_simple", [False, True])
def test_what_prompts_ask_for_is_never_in_the_data_set(is_simple):
    for number in range(20):
        person = subject(number, is_simple)
        shots, scenes = list(person.shots(40)), list(person.scenes(32))
        for part in ("colour", "expression", "background") if is_simple else UNSEEN:
            assert {getattr(shot, part) for shot in shots}.isdisjoint({getattr(shot, part) for shot in scenes})
        assert list(person.shots(10)) == shots[:10]
        assert person == subject(number, is_simple)
    assert len({subject(number).trigger for number in range(20)}) == 20


def test_the_manifest_says_what_each_image_was_made_to_show(tmp_path):
    dataset = DatasetFolder(tmp_path)
    for _ in range(2):  # what exists is not drawn again
        subject(3).write_images(dataset, 3)
    lines = read_json_lines(dataset.manifest)
    assert [line["file"] for line in lines] == [f"images/{number:03d}.png" for number in range(3)]
    assert lines[0]["texts"] == [subject(3).prompt(next(subject(3).shots(1)))]
    assert not set(subject(3).identity.tags) & set(lines[0]["texts"][0].split(", "))


def test_a_prompt_without_the_trigger_asks_for_the_class():
    alone, scene, of_class = (next(each for each in prompts_of(subject(0)) if each.kind == kind) for kind in COUNTS)
    assert (alone.of("kixlb"), alone.of("")) == ("kixlb", "1girl")
    assert scene.of("kixlb") == f"kixlb, {scene.of('')}"
    assert scene.of("").startswith("1girl, solo, ")
    assert of_class.of("kixlb") == of_class.of("") == "1girl"


def test_a_lora_file_is_rendered_as_its_adapter_computes_and_leaves_nothing_behind(artist, tiny_sdxl, tmp_path):
    unet = load_unet(find_base(str(tiny_sdxl), tiny_sdxl.parent), CPU, torch.float32)
    adapter = inject(unet, LoraSettings(lora_rank=2, lora_alpha=1.0), seed=0)
    torch.manual_seed(1)
    for module in adapter.modules:
        module.zero.copy_((0.1 * torch.randn(module.zero.shape)).half())
        module.factors["lora_down.weight"].copy_(module.factors["lora_down.weight"].half())
    write_lora(tmp_path / "some.safetensors", adapter.modules, {})
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 96)
    added = {"text_embeds": torch.randn(1, 64), "time_ids": torch.zeros(1, 6)}

    def answer(network) -> torch.Tensor:
        return network(*inputs, added_cond_kwargs=added, return_dict=False)[0]

    plain = answer(artist.unet)
    with artist.with_lora(tmp_path / "some.safetensors"):
        changed = answer(artist.unet)
    assert (changed - plain).abs().max() > 3e-2
    assert torch.allclose(changed, answer(unet), atol=1e-3)
    assert torch.equal(answer(artist.unet), plain)


def test_the_tagger_reads_in_wd14s_interface_what_the_reader_reads(reader, tmp_path):
    write_tagger(reader, tmp_path)
    with (tmp_path / "selected_tags.csv").open(encoding="utf-8") as file:
        names = [row["name"].replace("_", " ") for row in csv.DictReader(file)][4:]
    assert tuple(names) == ALL_TAGS
    tagger = Tagger(tmp_path / "model.onnx", tmp_path / "selected_tags.csv", batch_size=3)
    assert tagger.side_px == 64
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.float32)
    expected = reader.tags(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    assert np.abs(tagger.probabilities(list(images[..., ::-1]))[:, 4:] - expected.numpy()).max() < 1e-4


def test_the_base_model_measures_0_and_the_drawn_person_1(artist, reader):
    counts = dict(zip(COUNTS, (3, 3, 2), strict=True))
    judge = Judge(subject(0), artist, reader, counts)
    torch.manual_seed(0)
    images = torch.rand(8, 3, 64, 64)
    measured = judge.measure(images)
    raw = judge._raw(images)
    judge.base = raw  # as if these had been the base model's
    of_base = judge.measure(images)
    assert all(of_base[name] == 0 for name in ("likeness", "likeness_alone", "likeness_scene", "leakage", "drift"))
    assert of_base["diversity"] in (0, 1)
    judge.base, judge.drawn = raw | {f"distance_{kind}": 9.0 for kind in COUNTS}, raw
    assert judge.measure(images)["likeness"] == pytest.approx(1)
    assert set(measured) == {
        "likeness",
        "likeness_alone",
        "likeness_scene",
        "fidelity",
        "leakage",
        "class_leakage",
        "drift",
        "diversity",
    }


def test_every_recipe_has_settings_that_the_product_accepts(tmp_path, tiny_sdxl):
    """Their names are those of settings, and each round begins with what it is compared with or stands alone."""
    from common.settings import all_keys
    from demo.environment import SECTIONS

    known = {key.name.upper() for section in SECTIONS for key in all_keys(section)}
    arms = [arm for arms in ROUNDS.values() for arm in arms]
    assert all({*arm.settings, *arm.captions} <= known for arm in arms)
    names = [arm.name for arm in arms if arm.name != "base"]
    assert len(names) == len(set(names))
    run = Run(Arm("any", {"MIN_SNR_GAMMA": 0}, rate=2, saves=4), 0, 1, World(tmp_path, tmp_path, rate=2e-4))
    write_json(tmp_path / "world.json", {"px": 64})
    variables = run.variables()
    names = ("NUM_TRAIN_EPOCHS", "SAVE_EVERY_EPOCHS", "MIN_SNR_GAMMA", "LEARNING_RATE")
    assert [variables[name] for name in names] == ["80", "20", "0", "0.0004"]


def test_a_part_of_the_runs_is_a_smaller_experiment(tmp_path):
    runs = runs_of([Arm("first"), Arm("later", wait=1), Arm("once", seeds=1)], 2, 2, World(tmp_path, tmp_path))
    order = [(run.arm.name, run.number, run.seed) for run in runs]
    assert order[:4] == [("first", 0, 0), ("once", 0, 0), ("first", 1, 0), ("once", 1, 0)]
    assert order[4:8] == [("first", 0, 1), ("later", 0, 0), ("first", 1, 1), ("later", 1, 0)]
    assert order[8:] == [("later", 0, 1), ("later", 1, 1)]


def test_the_rate_is_the_smallest_that_is_nearly_as_good_as_the_best():
    likeness = {1e-4: 0.2, 2e-4: 0.56, 4e-4: 0.6, 1e-3: 0.55}
    results = [result(f"rate {rate:g}", number, 0, value) for rate, value in likeness.items() for number in range(2)]
    assert rate_of([*results, result("base", 0, 0, 0.9)]) == 2e-4


def test_jobs_run_at_once_on_every_gpu_and_none_begins_that_would_not_end_in_time(tmp_path):
    """A job that fails is reported, and one that hangs is killed before the time limit."""
    ended = {}

    def note(name: str, code: int, seconds: float) -> None:
        ended[name] = code

    def own_gpu() -> int:
        (tmp_path / f"{time.monotonic()}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        return 0

    jobs = [Job(f"job {number}", "quick", {}, tmp_path / "log", own_gpu) for number in range(4)]
    jobs += [Job("fails", "wrong", {}, tmp_path / "failed", lambda: 1 // 0)]
    jobs += [Job("hangs", "slow", {}, tmp_path / "log", lambda: time.sleep(60))]
    run_jobs(jobs, Limits(["0", "1"], jobs=2, measurers=1, seconds=3, reserve=1), note)
    assert ended == {**{f"job {number}": 0 for number in range(4)}, "fails": 70, "hangs": -9}
    assert sorted(path.read_text() for path in tmp_path.iterdir() if path.name[0].isdigit()) == ["0", "0", "1", "1"]
    assert "ZeroDivisionError" in (tmp_path / "failed").read_text()
    run_jobs(jobs[:1], Limits(["0"], jobs=2, measurers=1, seconds=1, reserve=1), note)
    assert len(list(tmp_path.iterdir())) == 6  # nothing was begun


def test_an_interval_of_people_contains_what_they_differ_by():
    middle, low, high = interval([0.1, 0.2, 0.3])
    assert (middle, low, high) == (pytest.approx(0.2), pytest.approx(0.1), pytest.approx(0.3))
    same, low, high = interval([0.5] * 5)
    assert same == low == high == pytest.approx(0.5)


def result(arm: str, number: int, seed: int, likeness: float, **more: object) -> dict:
    last = dict.fromkeys(("likeness_alone", "likeness_scene", "fidelity", "leakage", "drift", "diversity"), 0.5)
    saves = [last | {"likeness": likeness - 0.01, "samples": 500}, last | {"likeness": likeness, "samples": 1000}]
    return {"arm": arm, "subject": number, "seed": seed, "seconds": 10.0, "saves": saves, **more}


def test_recipes_are_compared_person_by_person():
    """People differ by more than the recipes do."""
    of_people = {0: 0.1, 1: 0.5, 2: 0.9}
    results = [result("base", number, seed, value) for number, value in of_people.items() for seed in range(2)]
    results += [result("better", number, seed, value + 0.05) for number, value in of_people.items() for seed in range(2)]
    results += [result("better", 7, 0, 0.0)]  # without a partner in the base recipe
    row = comparison(results, "base").splitlines()[-1]
    assert "**+0.050 [+0.050, +0.050]**" in row
    assert "0.500 (+0.000 [+0.000, +0.000])" in row


def test_recipes_are_compared_where_they_are_as_alike():
    """The slower one is at 0.4 after 2000 samples, where the base recipe is halfway between its saves."""

    def run(arm: str, number: int, likeness: tuple[float, ...], drift: tuple[float, ...]) -> dict:
        values = {"fidelity": 1.0, "leakage": 0.0, "diversity": 1.0}
        saves = [
            {"samples": 1000 * (index + 1), "likeness": each, "drift": drift[index], **values}
            for index, each in enumerate(likeness)
        ]
        return {"arm": arm, "subject": number, "seed": 0, "saves": saves, "base": {"fidelity": 1.0}}

    results = [run("base", number, (0.3, 0.5), (0.1, 0.3)) for number in range(3)]
    results += [run("slower", number, (0.2, 0.4), (0.1, 0.25)) for number in range(3)]
    results += [run("none", 0, (0.0, -0.1), (0.0, 0.0))]
    rows = at_equal_likeness(results, "base").splitlines()[2:]
    assert len(rows) == 1
    assert rows[0].startswith("| slower | 3 | 0.400 | 2000 | 1500 | ")
    assert "| 0.250 (**+0.050 [+0.050, +0.050]**) |" in rows[0]
    first = at_equal_likeness([run("base", 0, (0.3,), (0.1,)), run("slower", 0, (0.15,), (0.1,))], "base").splitlines()[-1]
    assert first.startswith("| slower | 1 | 0.150 | 1000 | 500 | ")
    assert "| 0.100 |" in first


def test_a_slower_recipe_is_also_compared_at_equal_time():
    results = [result("base", number, 0, 0.5) for number in range(3)]
    results += [result("slow", number, 0, 0.5, seconds=19.0) for number in range(3)]
    end, in_time = comparison(results, "base").splitlines()[-2:]
    assert end.startswith("| slow | 3 | 0.500 (+0.000")
    assert in_time.startswith("| slow, after 500 samples, as long as base | 3 | 0.490 (**-0.010 [-0.010, -0.010]**)")


def test_a_pick_counts_when_it_is_within_one_save_of_the_best():
    qualities = (0.2, 0.8, 0.6, 0.5)
    saves = [{"epochs": 10 * (number + 1), "likeness": value, "fidelity": value} for number, value in enumerate(qualities)]
    table = picks([{"saves": saves, "picks": {"recommended": 30, "best": 40}}, {"saves": saves, "picks": {"recommended": 21}}])
    assert "| recommended | 2 | 2 of 2 | 0.5 | 0.100 | 0.200 |" in table
    assert "| best | 1 | 0 of 1 | 2.0 | 0.300 | 0.300 |" in table
    losses = {2: 2.5, 4: 1.0, 6: 2.1, 8: 1.9, 10: 2.2, 12: 2.3, 14: 0.5}
    assert stopped_after(losses, patience=1) == 6
    assert stopped_after(losses, patience=2) == 12
    assert stopped_after(losses, patience=3) == 14


def test_nothing_asks_cuda_for_anything_before_the_first_fork():
    """Where a process has asked, its forks cannot use a GPU. This PyTorch pretends to have four, and counts the questions."""
    code = """
import torch
questions = []
torch._C._cuda_getDeviceCount = lambda: questions.append("count") or 4
torch._C._cuda_getCurrentRawStream = None
torch.cuda._device_count_nvml = lambda: 4
torch.cuda._lazy_init = lambda: questions.append("init")
from benchmarks.world import learn
learn.product.prepare_forks()
import train_lora, training.job, training.preflight, training.results
assert torch.cuda.is_available() and not torch.cuda.is_initialized()
assert questions == [], questions
"""
    environment = os.environ | {"PYTHONPATH": "scripts"}
    environment.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, check=True)


@pytest.mark.long
def test_jobs_run_in_processes_that_import_the_libraries_themselves_where_forks_cannot_be_used(tmp_path):
    ended = {}
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'scripts'}"}
    jobs = [Job(text, "any", environment, tmp_path / text, partial(int, text)) for text in ("3", "x")]
    limits = Limits([""], jobs=2, measurers=1, seconds=200, reserve=1, forks=False)
    run_jobs(jobs, limits, lambda name, code, seconds: ended.update({name: code}))
    assert ended == {"3": 3, "x": 70}
    assert "invalid literal for int()" in (tmp_path / "x").read_text()
