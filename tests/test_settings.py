"""Settings: TOML < environment < flags, typed, and all problems at once."""

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from captioning.config import CaptionSettings
from collecting.config import CollectSettings
from common import settings
from common.errors import SettingsError
from common.project import ComfyUIAddress, ProjectSettings, SharedTrainSettings
from common.settings import all_keys, read_request, resolve, resolved_toml
from training.config import TrainSettings

SECRETS = ("wandb_api_key", "comfyui_headers")


@dataclass(frozen=True)
class Everything:
    project: ProjectSettings
    collect: CollectSettings
    caption: CaptionSettings
    train: TrainSettings


@dataclass(frozen=True)
class Partial:
    collect: ComfyUIAddress
    train: SharedTrainSettings


SECTIONS = {name: field.type for name, field in Everything.__dataclass_fields__.items()}


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_shipped_file_states_every_key_once_with_the_default_value():
    shipped = resolve(settings.SETTINGS_FILE, {}, [], Everything)
    empty = {name: section() for name, section in SECTIONS.items()}
    stated = tomllib.loads(settings.SETTINGS_FILE.read_text(encoding="utf-8"))
    defaults = tomllib.loads(resolved_toml(empty))
    assert stated == defaults
    assert not [key for key, source in shipped.sources.items() if source == "default" and key not in SECRETS]


def test_every_key_has_a_name_of_its_own():
    names = [key.name for section in SECTIONS.values() for key in all_keys(section)]
    assert len(names) == len(set(names))


def test_environment_wins_over_file_and_flag_over_both(tmp_path):
    file = write(tmp_path, "[train.lora]\nlora_rank = 8\n[train.run]\ntrain_batch_size = 2\n")
    request = resolve(file, {"LORA_RANK": "16", "TRAIN_BATCH_SIZE": "3"}, ["lora_rank=4"], Everything)
    train = request.settings.train
    assert (train.lora.lora_rank, request.sources["lora_rank"]) == (4, "--set")
    assert (train.run.train_batch_size, request.sources["train_batch_size"]) == (3, "environment")
    assert request.sources["learning_rate"] == "default"
    assert request.described_overrides() == "lora_rank = 4, train_batch_size = 3"


def test_what_repeats_the_value_of_the_file_is_not_listed_as_overridden(tmp_path):
    file = write(tmp_path, "[train.lora]\nlora_rank = 8\n[train.run]\nnum_train_epochs = 7\n")
    variables = {"LORA_RANK": "8", "LORA_ALPHA": "32", "NUM_TRAIN_EPOCHS": "20", "CAPTION_EXCLUDE_TAGS": ","}
    request = resolve(file, variables, [], Everything)
    assert request.described_overrides() == "num_train_epochs = 20"
    assert request.sources["lora_rank"] == "environment"


def test_empty_variable_means_not_set(tmp_path):
    request = resolve(write(tmp_path, ""), {"LORA_RANK": "", "GLOBAL_SEED": ""}, [], Everything)
    assert request.settings.train.lora.lora_rank == 32
    assert request.settings.collect.global_seed is None


def test_all_problems_are_reported_at_once(tmp_path):
    text = '[train.lora]\nlora_rank = "big"\nlora_rang = 3\n[trian]\n'
    text += "[caption]\ncaption_threshold = 2.0\n[train.run]\ntrain_seed = true\n"
    with pytest.raises(SettingsError) as refused:
        resolve(write(tmp_path, text), {"LEARNING_RATE": "fast", "MIXED_PRECISION": "fp8"}, ["nonsense=1", "bare"], Everything)
    message = str(refused.value)
    for word in ("lora_rank", "lora_rang", "[trian]", "caption_threshold", "train_seed", "fast", "fp8", "nonsense", "bare"):
        assert word in message


def test_a_partial_section_ignores_the_keys_of_other_stages_and_checks_its_own(tmp_path):
    file = write(tmp_path, "[train.data]\nresolution = 768\nbucket_step = 32\n[train.lora]\nlora_rank = 8\n")
    train = resolve(file, {"CAPTION_CHUNKS": "2"}, ["base_model=mine"], Partial).settings.train
    assert (train.data.resolution, train.data.caption_chunks, train.model.base_model) == (768, 2, "mine")
    with pytest.raises(SettingsError, match="resolution"):
        resolve(write(tmp_path, "[train.data]\nresolution = 7\n"), {}, [], Partial)
    with pytest.raises(SettingsError, match="lora_rang: unknown key"):
        resolve(write(tmp_path, "[train.lora]\nlora_rang = 8\n"), {}, [], Everything)


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e9", "abc"])
def test_learning_rate_out_of_range_is_refused(tmp_path, value):
    with pytest.raises(SettingsError, match="learning_rate"):
        resolve(write(tmp_path, ""), {"LEARNING_RATE": value}, [], Everything)


def test_relative_paths_start_at_the_repository_in_the_file_and_at_the_current_directory_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = resolve(write(tmp_path, ""), {"FACE_REFERENCE": "me.png"}, [], Everything)
    assert request.settings.project.dataset_dir == settings.REPOSITORY / "dataset"
    assert request.settings.collect.face_reference == tmp_path / "me.png"


def test_home_of_an_unknown_user_and_a_path_with_a_null_byte_are_refused(tmp_path):
    file = write(tmp_path, '[project]\nmodels_dir = "a\\u0000b"\n')
    with pytest.raises(SettingsError) as refused:
        resolve(file, {"DATASET_DIR": "~unknown-user/images"}, [], Everything)
    assert "dataset_dir (environment): '~unknown-user/images' cannot be expanded: no such user" in str(refused.value)
    assert "models_dir (settings.toml): 'a\\x00b' must be a path" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"[train.optimizer]\nlearning_rate = 1{400 * '0'}\n", "learning_rate .*must be a number"),
        ("a = " + 3000 * "[", "not valid TOML"),
        (f"a = {5001 * '9'}\n", "not valid TOML"),
        ('[project]\ntrigger_word = "a\\u0000b"\n', "trigger_word .*must be text"),
        ('[project]\ntrigger_word = "a\\tb"\n', "control characters"),
        ('[caption]\ncaption_append = ["a\\nb"]\n', "caption_append .*must be a list of words"),
        ('[caption]\ncaption_append = ["a", ""]\n', "caption_append .*must be a list of words"),
    ],
)
def test_values_that_cannot_be_represented_are_refused(tmp_path, text, problem):
    with pytest.raises(SettingsError, match=problem):
        resolve(write(tmp_path, text), {}, [], Everything)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"trigger_word .*must be text, in UTF-8"):
        resolve(write(tmp_path, ""), {"TRIGGER_WORD": os.fsdecode(b"\xff\xfe")}, [], Everything)


def test_a_byte_order_mark_is_ignored(tmp_path):
    (tmp_path / "settings.toml").write_text("[train.lora]\nlora_rank = 8\n", encoding="utf-8-sig")
    assert resolve(tmp_path / "settings.toml", {}, [], Everything).settings.train.lora.lora_rank == 8


def test_a_deleted_current_directory_is_reported(tmp_path, monkeypatch):
    file, gone = write(tmp_path, ""), tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SettingsError, match="the current directory no longer exists"):
        resolve(file, {"OUTPUT_DIR": "here"}, [], Everything)


def test_secret_comes_from_its_variable_only_and_is_never_shown(tmp_path):
    request = resolve(write(tmp_path, ""), {"WANDB_API_KEY": "hush"}, [], Everything)
    assert request.settings.train.logging.wandb_api_key == "hush"
    assert "hush" not in "".join(request.described().values()) + repr(request) + resolved_toml(vars(request.settings))
    with pytest.raises(SettingsError, match="WANDB_API_KEY") as refused:
        resolve(write(tmp_path, '[train.logging]\nwandb_api_key = "hush"\n'), {}, [], Everything)
    assert "hush" not in str(refused.value)
    with pytest.raises(SettingsError, match="set WANDB_API_KEY") as refused:
        resolve(write(tmp_path, ""), {}, ["wandb_api_key=hush"], Everything)
    assert "hush" not in str(refused.value)


def test_resolved_file_gives_the_same_settings_again(tmp_path):
    request = resolve(write(tmp_path, ""), {"LORA_RANK": "5", "CAPTION_EXCLUDE_TAGS": "a b, c"}, [], Everything)
    again = resolve(write(tmp_path, resolved_toml(vars(request.settings))), {}, [], Everything)
    assert again.settings == request.settings


def test_a_partial_section_agrees_with_the_whole_one_and_ignores_its_other_keys(tmp_path):
    for name, section in (("collect", ComfyUIAddress), ("train", SharedTrainSettings)):
        whole = {key.name: key for key in all_keys(SECTIONS[name])}
        for key in all_keys(section):
            assert (key.default, key.metadata) == (whole[key.name].default, whole[key.name].metadata)
    file = write(tmp_path, '[collect]\ncomfyui_delay = 2\ncomfyui_endpoint = "http://spark:8188"\n[train.lora]\nlora_rank = 4\n')
    assert resolve(file, {}, [], Partial).settings.collect.comfyui_endpoint == "http://spark:8188"
    with pytest.raises(SettingsError, match=r"\[collect\] comfyui_delai: unknown key"):
        resolve(write(tmp_path, "[collect]\ncomfyui_delai = 2\n"), {}, [], Everything)


def test_version_is_that_of_the_changelog(capsys):
    with pytest.raises(SystemExit):
        read_request("train_lora", "", ["--version"], Everything)
    assert capsys.readouterr().out == f"LoRACat {settings.VERSION}\n"
    changelog = (settings.REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.+?)\]", changelog, re.MULTILINE)[1] == settings.VERSION
