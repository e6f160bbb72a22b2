"""The train stage as a user runs it on a tiny SDXL: what it writes, how it continues, and how it ends."""

import json
import re
import shutil
import signal
import tomllib
from collections import Counter

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from common.files import read_json_lines
from common.settings import resolved_toml
from demo import tiny_sdxl as miniature
from training.config import TrainSettings
from training.engine.step import TrainStep

TIMES = ("ss_training_finished_at", "modelspec.date")


def metadata(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def tensors(path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def untimed(path) -> tuple[dict[str, bytes], dict[str, str]]:
    """All that a LoRA file holds but the moment at which it was written."""
    return tensors(path), {name: value for name, value in metadata(path).items() if name not in TIMES}


def steps_in(stage) -> list[dict]:
    lines = (stage.output / "lora" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_whole_run_leaves_exactly_these_files(finished):
    stage, files = finished.stage, finished.files
    kinds = [name.rsplit("/", 1)[0] if name.startswith("cache/") else name for name in files]
    assert sorted(kinds) == sorted(
        [
            *["cache"] * 2,  # digests of the base model, and what it was measured to predict
            *["cache/latents"] * 4,
            *["cache/text"] * 5,
            "lora/metrics.jsonl",
            "lora/sks-000001.safetensors",
            "lora/sks-recommended.safetensors",
            "lora/sks.safetensors",
            "lora/sks.workflow.json",
            "lora/training_config_resolved.toml",
            "state/.lock",
            "state/sks/image_losses.json",
            "state/sks/sample_losses.jsonl",
            "state/sks/step-000000006.json",  # from which the run could be lengthened
            "state/sks/step-000000006.safetensors",
        ]
    )
    assert sorted(path.name for path in stage.models.iterdir()) == []
    page = (stage.output / "report.html").read_text(encoding="utf-8")  # written at the save, and again at the end
    assert "sks-recommended.safetensors" in page
    assert "The run is not finished." not in page


def test_the_history_says_on_what_and_how_long_the_run_took(finished):
    start, end = read_json_lines(finished.stage.output / "state" / "sks" / "history.jsonl")
    assert (start["event"], start["step"], start["steps"], start["device"]) == ("start", 0, 6, "the CPU in float32")
    assert {"LoRACat", "Python", "torch", "diffusers", "transformers", "peft"} <= start["versions"].keys()
    assert start["fingerprint"] == metadata(finished.stage.lora)["loracat_fingerprint"]
    assert end["event"] == "end"
    assert end["seconds"] > 0
    assert end["peak_bytes"] > 2**27


def test_the_start_says_what_the_run_will_do(finished):
    said = finished.output.splitlines()
    assert "mixed precision: no instead of bf16 (no NVIDIA GPU)" in said
    assert sum("mixed precision" in line for line in said) == 1
    assert "4 images in 1 bucket(s): 64x64 (4)" in said
    assert "2 epochs, 6 optimizer steps of 2, 12 training samples; epsilon, min-SNR 5.0, noise offset 0.0357" in said
    few = next(line for line in said if "are few" in line)
    assert few == "12 training samples are few: a likeness needs 2000 to 3000. Set NUM_TRAIN_EPOCHS=334, or add images."
    *_, written, following, warning = said
    assert written.startswith(f"{finished.stage.lora}: ")
    assert following.startswith(
        f"next: copy {finished.stage.output}/lora/sks-recommended.safetensors to ComfyUI's models/loras and "
    )
    assert "drag sks.workflow.json into its window, or load it beside an SDXL checkpoint at strength 1, with 'sks'" in following
    assert following.endswith(f"{finished.stage.output / 'report.html'}")
    assert warning == few
    assert "722 modules, all known to ComfyUI" in written


def test_every_step_has_its_line_in_the_metrics(finished):
    steps = steps_in(finished.stage)
    assert [line["step"] for line in steps] == list(range(6))
    assert [line["epoch"] for line in steps] == [0, 0, 0, 1, 1, 1]
    assert [line["lr"] for line in steps] == [0.01] * 6  # 5 % of six steps are one: the first has the peak
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 for line in steps)


def test_resolved_settings_have_every_auto_decided_and_every_setting_in_it(finished):
    assert "lora_rank = 2  # set by environment" in finished.files["lora/training_config_resolved.toml"].decode().splitlines()
    resolved = tomllib.loads(finished.files["lora/training_config_resolved.toml"].decode())
    every = tomllib.loads(resolved_toml({"train": TrainSettings()}))
    assert {table: set(keys) for table, keys in resolved["train"].items()} == {
        table: set(keys) for table, keys in every["train"].items()
    }
    train = resolved["train"]
    assert train["model"] | {"base_model": ""} == {
        "base_model": "",
        "prediction_type": "epsilon",
        "zero_terminal_snr": False,
        "mixed_precision": "no",
        "base_quantization": "none",
        "gradient_checkpointing": False,
    }
    assert (train["objective"]["min_snr_gamma"], train["objective"]["noise_offset"]) == (5.0, 0.0357)
    assert (train["saving"]["output_name"], train["lora"]["lora_rank"]) == ("sks", 2)
    undecided = [key for table in train.values() for key, value in table.items() if value == "auto"]
    # The first says when to stop on this machine, and nothing about the LoRA; the second is of another kind of adapter.
    assert set(undecided) <= {"memory_floor_gib", "lokr_factor"}


def test_a_finished_run_is_not_trained_again(finished):
    stage = finished.stage
    before = {path: path.stat().st_mtime_ns for path in stage.output.rglob("*")}
    said = stage.trained(**finished.variables)
    *_, done, following, warning = said.splitlines()
    assert done.startswith(f"nothing to do: {stage.lora} is finished")
    assert following.startswith(f"next: copy {stage.output}/lora/sks-recommended.safetensors to ComfyUI's models/loras")
    assert "training samples are few" in warning
    assert {path: path.stat().st_mtime_ns for path in stage.output.rglob("*")} == before


def test_a_run_that_is_stopped_ends_with_the_same_lora(finished, stage):
    """The same command continues at the state that was saved, and no other."""
    shutil.copytree(finished.stage.dataset, stage.dataset, dirs_exist_ok=True)
    same = finished.variables
    stopped = stage.stopped(2, signal.SIGTERM, **same)
    assert stopped.returncode == 143
    assert not stage.lora.exists()
    refused = stage.run(**same | {"LEARNING_RATE": 0.02, "NUM_TRAIN_EPOCHS": 1})
    assert refused.returncode == 2
    for words in ("learning_rate: 0.01 -> 0.02", "num_train_epochs: 2 -> 1", "FRESH=1"):
        assert words in refused.stderr
    said = stage.trained(**same)
    assert "continuing at step" in said
    assert untimed(stage.lora) == untimed(finished.stage.lora)
    assert stage.files().keys() == finished.files.keys()
    assert [(line["step"], line["loss"]) for line in steps_in(stage)] == [
        (line["step"], line["loss"]) for line in steps_in(finished.stage)
    ]


def test_new_settings_archive_the_lora_that_is_there(finished, stage):
    shutil.copytree(finished.stage.dataset, stage.dataset, dirs_exist_ok=True)
    shutil.copytree(finished.stage.output, stage.output)
    said = stage.trained(**finished.variables | {"LORA_RANK": 3, "NUM_TRAIN_EPOCHS": 1})
    (archive,) = (stage.output / "lora" / "archive").iterdir()
    assert f"moved the earlier LoRA sks to {archive}" in said
    kept = {path.name: path.read_bytes() for path in archive.iterdir()}
    assert kept == {name.removeprefix("lora/"): content for name, content in finished.files.items() if name.startswith("lora/")}
    left = {path.name for path in (stage.output / "lora").iterdir()}
    results = {"sks.safetensors", "sks-recommended.safetensors", "sks.workflow.json"}
    assert left == {"archive", *results, "metrics.jsonl", "training_config_resolved.toml"}
    assert metadata(stage.lora)["ss_network_dim"] == "3"
    assert "images: 0 encoded, 4 in the cache" in said
    assert "captions: 0 encoded, 5 in the cache" in said


def test_another_name_leaves_the_first_lora_where_it_is(finished, stage):
    shutil.copytree(finished.stage.dataset, stage.dataset, dirs_exist_ok=True)
    shutil.copytree(finished.stage.output, stage.output)
    another = {"OUTPUT_NAME": "other", "NUM_TRAIN_EPOCHS": 1, "LORA_TARGETS": "attention", "TENSORBOARD": 1, "WANDB_API_KEY": ""}
    stage.trained(**finished.variables | another)
    files = stage.files()
    for name in ("sks.safetensors", "sks-000001.safetensors", "sks-recommended.safetensors", "sks.workflow.json"):
        assert files[f"lora/{name}"] == finished.files[f"lora/{name}"]
    for name in ("metrics.jsonl", "training_config_resolved.toml"):
        assert files[f"lora/sks.{name}"] == finished.files[f"lora/{name}"]
    with safe_open(stage.output / "lora" / "other.safetensors", framework="pt") as file:
        assert len(file.keys()) == 3 * 560
    assert len(list(stage.output.glob("logs/other/events.out.tfevents.*"))) == 1
    stage.trained(**another | {"OUTPUT_NAME": "sks", "TENSORBOARD": 0})
    (archive,) = (stage.output / "lora" / "archive").iterdir()
    for name in ("metrics.jsonl", "training_config_resolved.toml"):
        assert (archive / f"sks.{name}").read_bytes() == finished.files[f"lora/{name}"]
        assert (stage.output / "lora" / f"other.{name}").read_bytes() == files[f"lora/{name}"]
        assert not (stage.output / "lora" / f"sks.{name}").exists()
    for name in ("sks.safetensors", "sks-recommended.safetensors", "sks.workflow.json"):
        assert (archive / name).read_bytes() == finished.files[f"lora/{name}"]


def test_batch_size_auto_takes_what_fits_and_goes_on_with_it(stage):
    for name in ("astronaut", "coffee", "chelsea"):
        stage.add(name)
    once = {"TRAIN_BATCH_SIZE": "auto", "NUM_TRAIN_EPOCHS": 1, "LORA_TARGETS": "attention"}
    said = stage.trained(**once)
    assert "batch size: 3 (auto: the largest for " in said
    assert "1 optimizer steps of 3" in said
    assert "nothing to do" in stage.trained(**once)
    stage.add("rocket")
    assert "batch size: 3 (auto: the largest for " in stage.trained(**once)


@pytest.mark.long
def test_a_single_file_trains_the_same_lora_as_its_folder_with_any_number_of_workers(finished, stage, tiny_single_file, tiny_sdxl):
    shutil.copytree(finished.stage.dataset, stage.dataset, dirs_exist_ok=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_sdxl / name, stage.models / "any-sdxl" / name)
    shutil.copy(tiny_single_file, stage.models / "one-file.safetensors")
    stage.trained(**finished.variables | {"BASE_MODEL": "one-file", "DATALOADER_NUM_WORKERS": 0})
    assert tensors(stage.lora) == tensors(finished.stage.lora)
    assert metadata(stage.lora)["ss_sd_model_name"] == "one-file"


@pytest.mark.long
@pytest.mark.parametrize("length", [500, 2000])
def test_timesteps_are_drawn_from_the_whole_noise_schedule_of_the_base(stage, tiny_sdxl, tmp_path, monkeypatch, length):
    """In training and in validation, for a base whose schedule is shorter or longer than SDXL's 1000 timesteps."""
    base = shutil.copytree(tiny_sdxl, tmp_path / "base")
    scheduler = base / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"num_train_timesteps": length}))
    seen, weighted_loss = [], TrainStep.weighted_loss

    def recorded(step, batch):
        seen.extend(batch.timesteps.tolist())
        return weighted_loss(step, batch)

    monkeypatch.setattr(TrainStep, "weighted_loss", recorded)
    for name in ("astronaut", "coffee", "chelsea"):
        stage.add(name)
    run = {"TRAIN_BATCH_SIZE": 1, "NUM_TRAIN_EPOCHS": 6, "VALIDATION_FRACTION": 0.3, "VALIDATE_EVERY_EPOCHS": 6}
    stage.trained(BASE_MODEL=base, **run)
    validation = [int((stratum + 0.5) / 8 * length) for stratum in range(8)]
    assert seen[-8:] == validation
    training = list((Counter(seen) - Counter(2 * validation)).elements())  # it is also measured at the beginning
    assert len(training) == 12
    assert 0 <= min(training) < length / 4
    assert length * 3 / 4 <= max(training) < length


def test_a_v_prediction_base_with_zero_terminal_snr_in_a_terminal(stage, tiny_sdxl):
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_sdxl / name, stage.models / "any-sdxl" / name)
    miniature.write_single_file(tiny_sdxl, stage.models / "v.safetensors", v_pred=True, ztsnr=True)
    stage.add("astronaut")
    stage.add("coffee")
    ended = stage.run(BASE_MODEL="v.safetensors", NUM_TRAIN_EPOCHS=1, terminal=True)
    assert ended.returncode == 0
    assert "v_prediction, min-SNR off, noise offset off\n" in ended.stdout
    shown = ended.stderr.replace("\r", "\n").splitlines()
    for bar in ("encode: 100%", "train: 100%"):
        assert any(line.startswith(bar) for line in shown)
    last = next(line for line in reversed(shown) if line.startswith("train: 100%"))
    assert re.search(r"2/2 \[\d\d:\d\d<\d\d:\d\d, .*img.*, epoch 1/1 loss \d+\.\d{4} lr 1\.00e-04\]", last), last
    about = metadata(stage.lora)
    assert (about["modelspec.prediction_type"], about["ss_v_parameterization"]) == ("v", "True")
    resolved = tomllib.loads((stage.output / "lora" / "training_config_resolved.toml").read_text())["train"]
    assert resolved["model"]["zero_terminal_snr"] is True
    assert (resolved["objective"]["min_snr_gamma"], resolved["objective"]["noise_offset"]) == (0.0, 0.0)


def test_weights_that_explode_end_the_run_with_step_and_images(stage):
    stage.add("astronaut")
    stage.add("coffee")
    ended = stage.run(LEARNING_RATE=1, LR_WARMUP=0, MAX_GRAD_NORM=0, NUM_TRAIN_EPOCHS=30, LORA_ALPHA=60000)
    assert ended.returncode == 2
    assert "astronaut.png, coffee.png" in ended.stderr
    assert "step " in ended.stderr
    assert "FRESH=1" in ended.stderr
    assert not stage.lora.exists()


@pytest.mark.parametrize(
    ("variables", "code", "words"),
    [
        ({"LORA_RANK": "thirty-two"}, 2, ("lora_rank (environment): 'thirty-two' must be a whole number",)),
        ({"LEARNING_RATE": "0"}, 2, ("learning_rate (environment): '0' must be above 0",)),
        ({"MIXED_PRECISION": "fp8", "TRAIN_BATCH_SIZE": "x"}, 2, ("mixed_precision", "train_batch_size")),
        ({"RESOLUTION": 1000}, 2, ("resolution must be a multiple of bucket_step",)),
        ({"BUCKET_MAX_SIDE": 64, "RESOLUTION": 128}, 2, ("bucket_max_side must not be smaller than resolution",)),
        ({"OUTPUT_NAME": "../mine"}, 2, ("output_name", "plain file name")),
        (
            {"OUTPUT_NAME": "mia-000029"},
            2,
            ("output_name", "must not end in -best, -recommended, -NNNNNN or .safetensors, which training uses for its own files"),
        ),
        ({"OUTPUT_NAME": "mia.safetensors"}, 2, ("output_name", "must not end in")),
        ({"TRIGGER_WORD": "mia-best"}, 2, ("output_name", "set OUTPUT_NAME")),
        ({"OUTPUT_NAME": " "}, 2, ("output_name", "plain file name")),
        ({"LORA_ALPHA": "100000"}, 2, ("lora_alpha (environment): '100000' must be at least 0.001 and at most 60000",)),
        ({"TRIGGER_WORD": "a/b"}, 2, ("output_name", "OUTPUT_NAME")),
        ({"BASE_MODEL": "no-such-model"}, 5, ("'no-such-model' is neither in", "hf download")),
    ],
)
def test_wrong_settings(stage, variables, code, words):
    stage.add("astronaut")
    ended = stage.run(**variables)
    assert ended.returncode == code
    assert ended.stderr.startswith("train_lora: ")
    for word in words:
        assert word in ended.stderr
    assert not stage.output.exists() or not list(stage.output.rglob("*.safetensors"))


@pytest.mark.parametrize("flags", [["--epochs", "3"], ["--set", "lora_rang=3"], ["--config", "/no/such.toml"]])
def test_wrong_flags(stage, flags):
    ended = stage.run(*flags)
    assert ended.returncode == 2
    assert ended.stderr.startswith("train_lora: ")


def test_a_base_that_cannot_be_used(stage, tmp_path, tiny_sdxl, tiny_single_file):
    stage.add("astronaut")
    (tmp_path / "old.ckpt").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "empty").mkdir()
    incomplete = shutil.copytree(tiny_sdxl, tmp_path / "incomplete")
    shutil.rmtree(incomplete / "vae")
    older = shutil.copytree(tiny_sdxl, tmp_path / "older")
    config = json.loads((older / "unet" / "config.json").read_text())
    (older / "unet" / "config.json").write_text(json.dumps(config | {"addition_embed_type": None, "cross_attention_dim": 768}))
    shutil.copy(tiny_single_file, tmp_path / "without-tokenizers.safetensors")
    bases = {"old.ckpt": "pickle", "empty": "model_index.json", "incomplete": "vae", "older": "unet"}
    for base, word in (bases | {"without-tokenizers.safetensors": "hf download"}).items():
        for flags in ([], ["--check"]):
            ended = stage.run(*flags, BASE_MODEL=tmp_path / base)
            assert (ended.returncode, list(stage.models.iterdir())) == (5, [])
            assert word in ended.stderr


def test_a_trigger_word_that_no_file_can_be_named_after_is_refused_with_the_settings(stage):
    assert stage.run("--settings", TRIGGER_WORD="a/b").returncode == 2
    with pytest.raises(SystemExit, match="0"):
        stage.run("--settings", TRIGGER_WORD="a/b", OUTPUT_NAME="mine")


def test_a_folder_in_the_place_of_a_file_is_one_line(stage):
    stage.add("astronaut")
    stage.output.mkdir()
    (stage.output / "cache").write_text("not a folder")
    ended = stage.run(LORA_TARGETS="attention")
    assert ended.returncode == 2
    assert ended.stderr.startswith("train_lora: ")
    assert "move what is there" in ended.stderr


def test_a_year_is_taken_for_repeats_with_a_line(stage):
    stage.add("astronaut", "2024_holiday/a.png")
    (stage.images / "99999999999999999999_x").mkdir()
    ended = stage.run("--check")
    assert ended.returncode == 0
    assert "repeats per epoch; rename it if it is a year: " in ended.stdout
    assert "2024_holiday\n" in ended.stdout


def test_captions_without_the_trigger_word_are_counted(stage):
    stage.add("astronaut", caption="photo of SKS smiling")
    assert "trigger word" not in stage.run("--check").stdout
    stage.add("coffee", caption="a cup")
    expected = (
        "1 of 2 captions do not contain the trigger word 'sks': run the caption stage again, or ignore this if it is intentional"
    )
    assert expected in stage.run("--check").stdout.splitlines()


def test_no_images_at_all(stage):
    ended = stage.run()
    assert ended.returncode == 3
    assert f"{stage.images}: no images" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_place_where_nothing_can_be_written(stage, tmp_path):
    stage.add("astronaut")
    (tmp_path / "file").touch()
    ended = stage.run(OUTPUT_DIR=tmp_path / "file")
    assert ended.returncode == 6
    assert f"{tmp_path / 'file'} is in the way: it is not a folder" in ended.stderr


def test_a_read_only_disk_is_said_before_training(stage, mount_tmpfs):
    stage.add("astronaut")
    mount_tmpfs(stage.output, "ro")
    for flags in (["--check"], []):
        ended = stage.run(*flags)
        assert ended.returncode == 6
        assert f"{stage.output} cannot be written to; make it writable for this user" in ended.stderr
        assert "modules of rank" not in ended.stdout


def test_check_looks_at_everything_and_says_all_that_is_wrong(stage):
    stage.add("astronaut")
    good = stage.run("--check")
    assert (good.returncode, good.stderr) == (0, "")
    assert "1 images in 1 bucket" in good.stdout
    assert not stage.output.exists()
    stage.add("coffee", caption=None)
    bad = stage.run("--check", BASE_MODEL="nowhere")
    assert bad.returncode == 5
    assert "'nowhere' is neither in" in bad.stderr
    assert "1 of the 2 images have no caption (coffee.png)" in bad.stderr
    assert not stage.output.exists()
