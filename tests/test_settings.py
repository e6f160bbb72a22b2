"""Settings: TOML < environment < flags, typed, and all problems at once."""

import json
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import report
import train_lora
from captioning.config import CaptionSettings
from collecting.config import CollectSettings
from collecting.http import parse_addresses
from common import masking, settings
from common.errors import ModelError, SettingsError, run_main
from common.output_layout import OutputLayout, name_problem
from common.project import ComfyUIAddress, FaceReferences, ProjectSettings, SharedTrainSettings
from common.settings import all_keys, read_request, resolve, resolved_toml
from common.variables import PROXY_VARIABLES, find_address_problems, known_variables
from reporting.recipe import read_settings
from training.config import TrainSettings
from training.system.device import comfyui_advice

SECRETS = ("wandb_api_key", "comfyui_headers", "comfyui_api_key")


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


COMMENTED = re.compile(r"(?m)^# (?=[a-z]\w* = )")
"""What is removed from a line of the settings file to set a rarely needed setting."""
SHIPPED = settings.SETTINGS_FILE.read_text(encoding="utf-8")


def flat(table: dict) -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        yield from flat(value) if isinstance(value, dict) else [(key, value)]


def test_shipped_file_states_every_key_once_with_the_default_value():
    stated = list(flat(tomllib.loads(COMMENTED.sub("", SHIPPED))))
    empty = {name: section() for name, section in SECTIONS.items()}
    assert sorted(stated) == sorted([*flat(tomllib.loads(resolved_toml(empty))), ("preset", "")])


def test_values_of_the_file_that_are_equal_to_the_default_count_as_not_set(tmp_path):
    for file in (settings.SETTINGS_FILE, write(tmp_path, COMMENTED.sub("", SHIPPED))):
        assert set(resolve(file, {}, [], Everything).sources.values()) == {"default"}


def test_shipped_file_begins_with_the_settings_that_most_people_set():
    """Those below "Rarely needed" are comments; the comments in between give a reason for every line."""
    often, rarely = SHIPPED.split("\n# Rarely needed\n")
    often, rarely = often.splitlines(), rarely.splitlines()
    assert 20 <= len([line for line in often if re.match(r"[a-z]\w* = ", line)]) <= 28
    assert not [line for line in often if COMMENTED.match(line)]
    assert all(re.match(r"# |\[\w+\.more\]$|$", line) for line in rarely)


@pytest.mark.parametrize("name", [line[2:].split(" = ")[0] for line in SHIPPED.splitlines() if COMMENTED.match(line)])
def test_uncommenting_a_line_of_the_shipped_file_sets_it(tmp_path, name):
    """A value that no setting can have shows that the line is read, and as which setting."""
    file = write(tmp_path, re.sub(rf"(?m)^# {name} = .*", f"{name} = {{}}", SHIPPED))
    with pytest.raises(SettingsError) as refused:
        resolve(file, {}, [], Everything)
    assert str(refused.value).startswith(f"invalid settings:\n  - {name} (settings.toml): {{}} must be ")


@pytest.mark.parametrize("text", ["[train]\nlora_rank = 8", "[train.lora]\nlora_rank = 8", "[train.more]\nlora_rank = 8"])
def test_a_setting_stands_in_the_table_of_its_stage_or_in_one_inside_it(tmp_path, text):
    for tables in (Everything, train_lora.Tables):
        request = resolve(write(tmp_path, text), {}, [], tables)
        assert (request.settings.train.lora.lora_rank, request.sources["lora_rank"]) == (8, "settings.toml")


def test_settings_that_have_the_name_of_a_table_stand_in_either(tmp_path):
    for text in (
        '[train]\noptimizer = "prodigy"\nlearning_rate = 1',
        '[train.optimizer]\noptimizer = "prodigy"\nlearning_rate = 1',
    ):
        assert resolve(write(tmp_path, text), {}, [], Everything).settings.train.optimizer.optimizer == "prodigy"


def test_a_stage_reads_its_part_of_a_table_wherever_it_stands(tmp_path):
    file = write(tmp_path, "[train]\nresolution = 768\n[train.lora]\nlora_rank = 8\n[train.more]\ncaption_chunks = 2\n")
    data = resolve(file, {}, [], Partial).settings.train.data
    assert (data.resolution, data.caption_chunks) == (768, 2)


PRESETS = sorted(path.stem for path in settings.PRESETS.glob("*.toml"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_changes_a_few_defaults_and_says_why(name):
    text = (settings.PRESETS / f"{name}.toml").read_text(encoding="utf-8")
    values = dict(flat(tomllib.loads(text)))
    request = resolve(settings.SETTINGS_FILE, {"PRESET": name}, [], Everything)
    assert request.overrides == {"preset", *values}
    assert {request.sources[key] for key in values} == {f"preset {name}"}
    assert 2 <= len(values) <= 8
    assert re.match(r"# .+", text)
    assert len(re.findall(r"(?m)^# .+\n(?:# .+\n)*[a-z]", text)) >= len(values) - 1  # two values may share a reason


def test_a_preset_is_weaker_than_the_file_and_stronger_than_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "PRESETS", tmp_path)
    (tmp_path / "mine.toml").write_text(
        "[train]\nlora_rank = 4\nlearning_rate = 0.5\n[train.run]\ntrain_seed = 7\nnum_train_epochs = 3\n"
    )
    file = write(tmp_path, '[project]\npreset = "mine"\n[train]\nlora_rank = 8\nlearning_rate = 0.0001\n')
    request = resolve(file, {"NUM_TRAIN_EPOCHS": "20"}, [], Everything)
    train = request.settings.train
    assert (train.lora.lora_rank, request.sources["lora_rank"]) == (8, "settings.toml")
    assert (train.optimizer.learning_rate, request.sources["learning_rate"]) == (0.5, "preset mine")  # the file has the default
    assert (train.run.train_seed, request.sources["train_seed"]) == (7, "preset mine")
    assert (train.run.num_train_epochs, request.sources["num_train_epochs"]) == (20, "environment")
    assert request.overrides == {"preset", "lora_rank", "learning_rate", "train_seed", "num_train_epochs"}
    assert "  train_seed = 7  (preset mine)" in request.overridden()
    text = resolved_toml(vars(request.settings), {key: request.sources[key] for key in request.overrides})
    assert "train_seed = 7  # set by preset mine" in text
    assert "num_train_epochs = 20  # set by environment" in text
    on_the_page = {setting.key: setting.origin for setting in read_settings(text)}
    assert (on_the_page["train.run.train_seed"], on_the_page["train.lora.lora_type"]) == ("preset mine", "")
    again = resolve(write(tmp_path, text), {}, [], Everything)
    assert again.settings.train == train


@pytest.mark.parametrize("overrides", [["preset=mine"], []])
@pytest.mark.parametrize("variables", [{"PRESET": "mine"}, {"PRESET": ""}, {}])
def test_the_preset_is_chosen_by_the_strongest_source(tmp_path, monkeypatch, overrides, variables):
    monkeypatch.setattr(settings, "PRESETS", tmp_path)
    for name, rank in (("mine", 4), ("other", 5)):
        (tmp_path / f"{name}.toml").write_text(f"[train]\nlora_rank = {rank}\n")
    file = write(tmp_path, '[project.more]\npreset = "other"\n')
    expected = 4 if overrides or variables.get("PRESET") else 5
    assert resolve(file, variables, overrides, Everything).settings.train.lora.lora_rank == expected
    assert resolve(file, variables, ["preset="], Everything).settings.train.lora.lora_rank == 32


@pytest.mark.parametrize("name", ["persn", "../person", "PERSON", "person.toml"])
def test_an_unknown_preset_is_refused_with_those_that_exist(tmp_path, name):
    for file, variables in ((f"[project]\npreset = '{name}'\n", {}), ("", {"PRESET": name})):
        with pytest.raises(SettingsError) as refused:
            resolve(write(tmp_path, file), variables | {"LORA_RNK": "8"}, ["lora_rank=x"], Everything)
        assert str(refused.value).splitlines() == [
            "invalid settings:",
            f"  - preset: there is none called {name!r}; choose one of {', '.join(PRESETS)}, or leave it empty",
            "  - lora_rank (--set): 'x' must be a whole number",
            "  - unknown variable LORA_RNK in the environment: it has no effect; did you mean LORA_RANK?",
        ]


def test_what_is_wrong_in_a_preset_is_named_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "PRESETS", tmp_path)
    (tmp_path / "mine.toml").write_text("[train]\nlora_rang = 4\nlora_rank = 0\n[trian]\n[collect]\ncomfyui_api_key = 'x'\n")
    with pytest.raises(SettingsError) as refused:
        resolve(write(tmp_path, ""), {"PRESET": "mine"}, [], Everything)
    assert str(refused.value).splitlines() == [
        "invalid settings:",
        "  - [trian]: unknown table in preset mine; known: project, collect, caption, train",
        "  - comfyui_api_key: a secret is read from the environment only; set COMFYUI_API_KEY",
        "  - [train] lora_rang: unknown key (did you mean lora_rank?) in preset mine",
        "  - lora_rank (preset mine): 0 must be at least 1 and at most 1024",
    ]
    (tmp_path / "mine.toml").write_text("[train")
    with pytest.raises(SettingsError, match=r"mine\.toml: not valid TOML"):
        resolve(write(tmp_path, ""), {"PRESET": "mine"}, [], Everything)
    with pytest.raises(SettingsError, match=r"preset \(settings\.toml\): 3 must be text"):
        resolve(write(tmp_path, "[project]\npreset = 3\n"), {}, [], Everything)


INNER = "more, model, data, lora, objective, optimizer, run, processes, validation, samples, saving, logging"
LROA = f"[train.lroa]: unknown table in settings.toml; known: {INNER}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "[train]\nlora_rank = 8\n[train.lora]\nlora_rank = 9\n",
            "lora_rank: is in [train] and in [train.lora] of settings.toml; keep one of them",
        ),
        ("[train]\nlora_rang = 8\n", "[train] lora_rang: unknown key (did you mean lora_rank?) in settings.toml"),
        ("[train.more]\nlora_rang = 8\n", "[train.more] lora_rang: unknown key (did you mean lora_rank?) in settings.toml"),
        ("[train.lroa]\nlora_rank = 8\n", LROA),
        ("[train]\nlora = 8\n", "train.lora: must be a table, [train.lora]"),
        ("train = 8\n", "train: must be a table, [train]"),
        ("[caption]\nlora_rank = 8\n", "[caption] lora_rank: unknown key here (it belongs in [train]) in settings.toml"),
        ("[caption.lora]\n", "[caption.lora]: unknown table in settings.toml; known: more"),
        ("[train.more.lora]\nlora_rank = 8\n", "[train.more] lora: unknown key (did you mean lora_l2?) in settings.toml"),
        ("[train.lora.lora_rank]\n", "lora_rank (settings.toml): {} must be a whole number"),
    ],
)
def test_what_stands_in_the_wrong_place_is_one_line(tmp_path, text, problem):
    with pytest.raises(SettingsError) as refused:
        resolve(write(tmp_path, text), {}, [], Everything)
    assert str(refused.value).splitlines() == ["invalid settings:", f"  - {problem}"]


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


def test_empty_variable_means_not_set(tmp_path):
    request = resolve(write(tmp_path, ""), {"LORA_RANK": "", "GLOBAL_SEED": ""}, [], Everything)
    assert request.settings.train.lora.lora_rank == 32
    assert request.settings.collect.global_seed is None


def test_an_empty_value_means_not_set_wherever_it_stands(tmp_path):
    file = write(tmp_path, '[train]\nnum_train_steps = ""\nlora_rank = 8\nloss = ""\n[project]\ndataset_dir = ""\noutput_name = ""')
    with pytest.raises(SettingsError, match=r"\[project\] output_name: unknown key here \(it belongs in \[train\]\)"):
        resolve(file, {}, [], Everything)
    file = write(tmp_path, file.read_text().replace('output_name = ""', 'trigger_word = "sks"'))
    request = resolve(file, {}, ["lora_rank=", "learning_rate=", "trigger_word=me"], Everything)
    train = request.settings.train
    assert (train.run.num_train_steps, train.objective.loss, train.lora.lora_rank) == (0, "mse", 8)
    assert request.settings.project.dataset_dir == settings.REPOSITORY / "dataset"
    assert request.overrides == {"lora_rank", "trigger_word"}


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
    assert request.settings.collect.face_reference == (tmp_path / "me.png",)


def test_list_of_paths_is_one_path_where_there_is_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a, b.png").touch()
    for text, names in {"a, b.png": ["a, b.png"], "a.png, ~x,b.png,": None, "c.png, d.png,": ["c.png", "d.png"]}.items():
        if names is None:
            with pytest.raises(SettingsError, match="no such user"):
                resolve(write(tmp_path, ""), {"FACE_REFERENCE": text}, [], Everything)
        else:
            request = resolve(write(tmp_path, ""), {"FACE_REFERENCE": text}, [], Everything)
            assert request.settings.collect.face_reference == tuple(tmp_path / name for name in names)
    in_file = resolve(write(tmp_path, '[collect]\nface_reference = ["a.png", "b, c.png"]\n'), {}, [], Everything)
    assert in_file.settings.collect.face_reference == (settings.REPOSITORY / "a.png", settings.REPOSITORY / "b, c.png")
    for value in ('""', "[]"):
        empty = resolve(write(tmp_path, f"[collect]\nface_reference = {value}\n"), {}, [], Everything)
        assert empty.settings.collect.face_reference == ()
    with pytest.raises(SettingsError, match=r"face_reference .*must be a path, or a list of paths"):
        resolve(write(tmp_path, "[collect]\nface_reference = [1]\n"), {}, [], Everything)


@pytest.mark.parametrize(
    ("text", "in_file", "resolutions"),
    [
        ("768", "768", (768,)),
        ("1024,768", "[1024, 768]", (1024, 768)),
        (" 768, 1024,768, ", "[768, 1024, 768]", (1024, 768)),
        ("512,", "[512]", (512,)),
    ],
)
def test_a_number_may_be_a_list(tmp_path, text, in_file, resolutions):
    from_text = resolve(write(tmp_path, ""), {"RESOLUTION": text}, [], Everything)
    from_file = resolve(write(tmp_path, f"[train]\nresolution = {in_file}\n"), {}, [], Everything)
    assert from_text.settings.train.data.resolutions == from_file.settings.train.data.resolutions == resolutions


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1024,x", "resolution (environment): '1024,x' must be a whole number or a list of them"),
        (",", "resolution (environment): ',' must be a whole number or a list of them"),
        ("1024;768", "resolution (environment): '1024;768' must be a whole number or a list of them"),
        ("1024,32", "resolution (environment): '1024,32' must be at least 64 and at most 4096"),
        ("1024,700", "resolution must be a multiple of bucket_step, and bucket_step of 8"),
        ("512,4096", "bucket_max_side must not be smaller than resolution"),
    ],
)
def test_each_number_of_a_list_is_checked(tmp_path, text, problem):
    with pytest.raises(SettingsError) as refused:
        resolve(write(tmp_path, ""), {"RESOLUTION": text}, [], Everything)
    assert problem in str(refused.value)


@pytest.mark.parametrize("value", ["[]", '["1024"]', "[1024.5]", "[true]"])
def test_a_list_in_the_file_that_is_none_of_numbers_is_refused(tmp_path, value):
    with pytest.raises(SettingsError, match=r"resolution \(settings.toml\): .* must be a whole number or a list of them"):
        resolve(write(tmp_path, f"[train]\nresolution = {value}\n"), {}, [], Everything)


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


def test_what_differs_from_the_defaults_is_listed_wherever_it_was_set(tmp_path):
    text = settings.SETTINGS_FILE.read_text(encoding="utf-8")
    file = write(tmp_path, re.sub(r"(?m)^lora_rank *=.*", "lora_rank = 7", text))
    request = resolve(file, {"LORA_TYPE": "lora", "CAPTION_EXCLUDE_TAGS": "a,b"}, ["resolution=512"], Everything)
    assert request.overridden().splitlines() == [
        "overridden settings:",
        "  caption_exclude_tags = ['a', 'b']  (environment)",
        "  resolution = 512  (--set)",
        "  lora_rank = 7  (settings.toml)",
        "  lora_type = 'lora'  (environment)",
    ]
    assert resolve(settings.SETTINGS_FILE, {}, [], Everything).overridden() == "overridden settings: none"


def test_alpha_follows_the_rank_unless_it_is_set(tmp_path):
    file = write(tmp_path, "")
    of = {
        name: resolve(file, variables, [], Everything).settings.train.lora
        for name, variables in {
            "default": {},
            "rank": {"LORA_RANK": "4"},
            "both": {"LORA_RANK": "4", "LORA_ALPHA": "2"},
            "auto": {"LORA_ALPHA": "auto"},
        }.items()
    }
    assert {name: (lora.lora_rank, lora.alpha) for name, lora in of.items()} == {
        "default": (32, 32.0),
        "rank": (4, 4.0),
        "both": (4, 2.0),
        "auto": (32, 32.0),
    }
    assert of["rank"].describe() == "rank 4, alpha 4 (scale 1, auto)"
    assert of["both"].describe() == "rank 4, alpha 2 (scale 0.5)"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("LORA_RNK", "LORA_RANK"), ("TRIGER_WORD", "TRIGGER_WORD"), ("OUTPUT_DRI", "OUTPUT_DIR"), ("lora_rank", "LORA_RANK"),
        ("COMFYUI_ENDPOINTS", "COMFYUI_ENDPOINT"), ("COMFYUI_URL", "COMFYUI_ENDPOINT"), ("COMFYUI_HEADER", "COMFYUI_HEADERS"),
        ("WANDB_APIKEY", "WANDB_API_KEY"), ("NUM_TRAIN_EPOCH", "NUM_TRAIN_EPOCHS"), ("STRCT", "STRICT"), ("LORA_MOMENTUM", ""),
        ("LORANK", "LORA_RANK"), ("NETWORK_DIM", "LORA_RANK"),
        ("CAPTION_LANGUAGE", ""), ("TRAIN_STEPS", ""),
    ],
)  # fmt: skip
def test_misspelt_variables_are_reported_by_every_stage(tmp_path, monkeypatch, name, hint):
    monkeypatch.setattr(settings, "ENV_FILE", tmp_path / ".env")
    for section in ("project", "collect", "caption", "train"):
        request = resolve(write(tmp_path, ""), {name: "4"}, [], make_dataclass("Tables", [(section, SECTIONS[section])]))
        (line,) = request.unknown_variables
        assert line.startswith(f"unknown variable {name} in the environment: it has no effect; ")
        assert hint in line
        assert line in request.overridden()
    (tmp_path / ".env").write_text(f"# LORA_RNC=1\nLORA_RANK=4\n{name}=secret value\nEMPTY_LORA_RNK=\n")
    (line,) = resolve(write(tmp_path, ""), {}, [], Everything).unknown_variables
    assert line.startswith(f"unknown variable {name} in .env: ")
    assert "secret" not in line


OF_OTHER_PROGRAMS = """
PATH HOME USER SHELL TERM LANG LC_ALL PWD TZ TMPDIR EDITOR HOSTNAME DISPLAY HF_HOME HF_TOKEN HF_ENDPOINT HF_HUB_OFFLINE
HF_HUB_CACHE HUGGINGFACE_HUB_CACHE TRANSFORMERS_CACHE DIFFUSERS_CACHE TORCH_HOME TORCH_CUDA_ARCH_LIST PYTORCH_VERSION
PYTORCH_CUDA_ALLOC_CONF PYTORCH_BUILD_VERSION CUDA_HOME CUDA_VISIBLE_DEVICES CUDA_VERSION CUDA_DEVICE_ORDER
NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NVIDIA_PRODUCT_NAME NVIDIA_PYTORCH_VERSION NCCL_DEBUG NCCL_SOCKET_IFNAME
OMP_NUM_THREADS MKL_NUM_THREADS PYTHON PYTHON3 PYTHONPATH PYTHONUNBUFFERED PYTHON_VERSION VIRTUAL_ENV CONDA_PREFIX WANDB_MODE
WANDB_DIR WANDB_ENTITY WANDB_NAME WANDB_BASE_URL WANDB_SILENT TENSORBOARD_PORT COMFYUI_PATH COMFYUI_PORT COMFYUI_HOST
COMFYUI_DIR COMFYUI_ARGS COMFYUI_MODEL_PATH RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT ACCELERATE_MIXED_PRECISION
HTTP_PROXY https_proxy no_proxy REQUESTS_CA_BUNDLE SSL_CERT_FILE DOCKER_HOST COMPOSE_PROJECT_NAME COMPOSE_FILE DATA_DIR
INPUT_DIR MODEL MODEL_PATH DATASET SEED DEBUG LOG_LEVEL PORT HOST BATCH_SIZE TRITON_CACHE_DIR LD_LIBRARY_PATH SLURM_JOB_ID
LORACAT_LAUNCHER_PID BASE_IMAGE STRICT
"""


def test_variables_of_other_programs_are_not_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "ENV_FILE", tmp_path / ".env")
    (tmp_path / ".env").write_text("".join(f"{name}=1\n" for name in OF_OTHER_PROGRAMS.split()))
    environment = dict.fromkeys(OF_OTHER_PROGRAMS.split(), "1")
    assert resolve(write(tmp_path, ""), environment, [], report.Tables).unknown_variables == ()


def test_every_variable_is_known_to_every_stage():
    known = known_variables(settings.SETTINGS_FILE, ())
    assert {key.name.upper() for section in SECTIONS.values() for key in all_keys(section)} <= known


def test_variables_that_are_no_settings_are_not_reported(tmp_path):
    variables = {"LORACAT_IN_CONTAINER": "1", "LORACAT": "/app", "LOGNAME": "me"}
    assert resolve(write(tmp_path, ""), variables, [], Everything).unknown_variables == ()


def test_of_a_large_file_only_the_beginning_is_read(tmp_path):
    with (tmp_path / "settings.toml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SettingsError, match="not valid TOML"):
        resolve(tmp_path / "settings.toml", {}, [], Everything)


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(SettingsError) as refused:
        resolve(write(tmp_path, "[train.lora]\nlora_rang = 3\nxyz = 1\n"), {}, ["capton_model=x"], Everything)
    assert str(refused.value).splitlines()[1:] == [
        "  - [train.lora] lora_rang: unknown key (did you mean lora_rank?) in settings.toml",
        "  - [train.lora] xyz: unknown key in settings.toml",
        "  - --set capton_model: unknown key (did you mean caption_model?)",
    ]


@pytest.mark.parametrize("variable", ["OUTPUT_NAME", "TRIGGER_WORD"])
@pytest.mark.parametrize("letter", ["a", "猫"])
def test_names_too_long_for_the_file_system_are_refused_with_the_settings(tmp_path, variable, letter):
    name = letter * (222 // len(letter.encode()))
    variables = {"OUTPUT_DIR": str(tmp_path / "absent" / "output")}
    resolve(write(tmp_path, ""), variables | {variable: name}, [], train_lora.Tables)
    with pytest.raises(SettingsError, match=r"output_name.* has 22[35] bytes; choose a name of at most 222 bytes"):
        resolve(write(tmp_path, ""), variables | {variable: name + letter}, [], train_lora.Tables)


def test_the_longest_name_is_one_that_every_file_of_a_run_can_have(tmp_path):
    outputs, other = (OutputLayout(tmp_path, letter * 222) for letter in "ab")
    assert name_problem(outputs.name, tmp_path) is None
    for _ in range(2):
        for path in (outputs.lora, outputs.best, outputs.lora_after(999999), outputs.metrics, outputs.state / "state.json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        outputs.resolved_config.write_text(f'[train.saving]\noutput_name = "{outputs.name}"\n')
        other.begin(resumes=False)
        assert (outputs.lora_dir / f"{outputs.name}.training_config_resolved.toml").exists()
        outputs.begin(resumes=False)
    assert len(list(outputs.archive.iterdir())) == 2


PASSWORD = "Tr0ub4dor"
MALFORMED = [
    "http://me:{}@host:8188", "http://me:{}@host:port", "me:{}@host", "me:{}", "http://me:{}", "http:/me:{}@host",
    "http:me:{}@host",
    "//me:{}@host", "http://me:{}/@host", "http://me: {} @host", "http://me:@{}@@host", "http://[me:{}@host", "http://me:{}]@host",
    "http://me:{}%@host", "http://me:{}%40host", "http://me:{}%2540host", "http://me:{}\uff20host", "http://me:h\u00f6her{}@host",
    "http://me\uff1a{}", "http://me:{}?@host", "http://me:{}#@host", "http://host/?token={}", "http://host#{}", "ftp://me:{}@host",
    "http://a:{}@one,http://b:{}@two", "http://a:{}@one, b:{}@two", "http://a:x,{}@one", "HTTP://me:{}@host", "http:\\\\me:{}@host",
    " http://me:{}@host ", "http://me:{}@", "http://{}@host:99999", "http://me:{}@ho st", "http://me:{}\n@host", "'http://me:{}@host'",
]  # fmt: skip


@pytest.mark.parametrize("template", MALFORMED)
@pytest.mark.parametrize("source", ["environment", "file", "flag"])
def test_the_login_in_an_address_is_never_shown(tmp_path, template, source):
    address = template.replace("{}", PASSWORD)
    text = f"[collect]\ncomfyui_endpoint = {json.dumps(address)}\n" if source == "file" else ""
    variables = {"COMFYUI_ENDPOINT": address} if source == "environment" else {}
    flags = [f"comfyui_endpoint={address}"] if source == "flag" else []
    shown = ""
    for tables in (Everything, train_lora.Tables):
        try:
            request = resolve(write(tmp_path, text), variables, flags, tables)
            shown += "\n".join(request.described()) + request.overridden() + resolved_toml(vars(request.settings))
            shown += comfyui_advice(request.settings.collect.comfyui_endpoint)
            for server in parse_addresses(request.settings.collect.comfyui_endpoint):
                shown += f"{server} {server.url}"
        except SettingsError as refused:
            shown += str(refused)
    assert "host" in shown or "one" in shown or "me" in shown
    assert PASSWORD not in shown


noise = st.text("/:@%?#[]\\ ,&=+;\"'\n\uff20\ufe6b\uff1aé猫40", max_size=8)


@given(
    scheme=st.sampled_from(["http://", "https://", "HTTP:/", "ws:\\\\", "//", "", "http:", " http://"]),
    before=noise,
    after=noise,
    at=st.sampled_from(["@", "%40", "%2540", "\uff20", "@@"]),
    host=noise.map(lambda text: f"host{text}"),
)
def test_no_address_with_an_at_sign_shows_what_is_before_it(scheme, before, after, at, host):
    address = f"{scheme}me:{before}{PASSWORD}{after}{at}{host}"
    assert PASSWORD not in masking.mask_address(address)
    assert PASSWORD not in masking.mask_address(f"http://other:8188, {address}, http://more:8188")
    with mock.patch.object(masking, "_known", set()):
        masking.learn_secrets({"COMFYUI_ENDPOINT": address})
        for said in (address, f"no host in {before}{PASSWORD}{after}"):
            assert PASSWORD not in masking.mask_secrets(said)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8188", "https://[::1]:8188/comfy", "http://a:1,http://b:2", "http://host"])
def test_addresses_without_a_login_are_shown_as_they_are(address):
    assert masking.mask_address(address) == masking.mask_secrets(address) == address


def test_an_address_in_a_list_is_masked_alone():
    assert masking.mask_secrets("no route to http://one:8188,http://me:it@two") == "no route to http://one:8188,http://***@two"


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "HTTPS_PROXY", "http_proxy", "ALL_PROXY", "WANDB_BASE_URL"])
@pytest.mark.parametrize("template", MALFORMED[:20])
def test_what_a_library_says_about_an_address_of_the_environment_is_masked(tmp_path, capsys, variable, template):
    if "@" not in template:
        template += "@host"
    address = template.replace("{}", PASSWORD)
    resolve(write(tmp_path, ""), {variable: address}, [], report.Tables)
    login = address.rpartition("@")[0].rpartition("//")[2]

    def fail():
        raise ModelError(f"cannot connect to {address}: invalid port {login.partition(':')[2]!r} in {login}")

    def crash():
        raise RuntimeError(f"unexpected address {address}")

    assert (run_main("stage", fail), run_main("stage", crash)) == (5, 70)
    printed = capsys.readouterr().err
    assert "cannot connect to" in printed
    assert "unexpected address" in printed
    assert PASSWORD not in printed


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["settings.toml", ".env", "training_config.toml"])
def test_a_pipe_a_folder_or_a_device_is_not_read(tmp_path, monkeypatch, make, name):
    """A pipe would be waited for, a device has no end."""
    make(tmp_path / name)
    if name == "settings.toml":
        with pytest.raises(
            SettingsError, match=r"settings\.toml: cannot be read as a settings file: (Is a dir|Not a regular file)"
        ):
            resolve(tmp_path / name, {}, [], Everything)
        return
    monkeypatch.setattr(settings, "ENV_FILE" if name == ".env" else "SETTINGS_FILE", tmp_path / name)  # only for their names
    assert resolve(write(tmp_path, ""), {}, [], Everything)


@pytest.mark.parametrize(
    "address", ["http://h:x", "http://h:0", "http://h:99999", "http://", "http://a b", "http://a..b", "ftp://h", "h"]
)
def test_a_malformed_address_of_another_program_is_named_by_its_variable(address):
    (line,) = find_address_problems({"HF_ENDPOINT": address, "ALL_PROXY": ""}, ["HF_ENDPOINT", *PROXY_VARIABLES])
    assert line.startswith("HF_ENDPOINT is not a valid address: it")
    assert address not in line.removeprefix("HF_ENDPOINT is not a valid address: it must begin with http:// or https://")


@pytest.mark.parametrize(
    "address", ["http://h", "https://me:it@h:1/x", "h:3128", "me:it@h:3128", "socks5h://[::1]:1", " http://ä.example "]
)
def test_proxies_as_http_libraries_accept_them_are_no_problem(address):
    assert list(find_address_problems(dict.fromkeys(PROXY_VARIABLES, address), PROXY_VARIABLES)) == []


@pytest.mark.parametrize("address", ["http://me:hunter2@127.0.0.1:9", "http://me:hunter2@127.0.0.1:x", "127.0.0.1"])
def test_an_address_of_weights_and_biases_with_a_login_is_refused_before_it_is_printed(tmp_path, monkeypatch, address):
    monkeypatch.setenv("WANDB_BASE_URL", address)
    assert resolve(write(tmp_path, ""), {}, [], train_lora.Tables)
    with pytest.raises(SettingsError, match="WANDB_BASE_URL") as refused:
        resolve(write(tmp_path, ""), {"WANDB_API_KEY": "k" * 40}, [], train_lora.Tables)
    assert "hunter2" not in str(refused.value)


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
    assert "hush" not in "".join(request.described()) + repr(request) + resolved_toml(vars(request.settings))
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


def test_resolved_file_says_where_a_value_was_set(tmp_path):
    request = resolve(write(tmp_path, ""), {"LORA_RANK": "5", "TRIGGER_WORD": "a # b", "RESOLUTION": "1024,768"}, [], Everything)
    text = resolved_toml(vars(request.settings), request.sources)
    assert "lora_rank = 5  # set by environment" in text
    assert "resolution = [  # set by environment\n" in text
    assert resolve(write(tmp_path, text), {}, [], Everything).settings == request.settings


def test_a_partial_section_agrees_with_the_whole_one_and_ignores_its_other_keys(tmp_path):
    for name, section in (("collect", ComfyUIAddress), ("collect", FaceReferences), ("train", SharedTrainSettings)):
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
