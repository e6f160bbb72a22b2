"""README.md and the files beside it say what the program does."""

import json
import math
import re
import signal
import subprocess
import tomllib

import pytest
import yaml

from captioning.config import CaptionSettings
from collecting.config import CollectSettings
from collecting.workflow import CONFIG_KEYS
from common import errors
from common.project import ProjectSettings
from common.settings import REPOSITORY, SETTINGS_FILE, all_keys
from training.config import TrainSettings

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
RUN_SH = (REPOSITORY / "scripts" / "run.sh").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8"))
SECTIONS = (ProjectSettings, CollectSettings, CaptionSettings, TrainSettings)

KEYS = {key.name.upper(): key for section in SECTIONS for key in all_keys(section)}
OF_RUN_SH = dict(re.findall(r"\$\{([A-Z_]+):-(\w*)", RUN_SH))
"""Variables that run.sh reads itself, with what it takes for an empty one."""
NOT_IN_COMPOSE = {"PYTHON"}
"""Set by the image, for whatever .venv the mounted repository holds."""


def table_rows(first_header: str) -> list[list[str]]:
    """The cells of the rows of README's table whose first header is that; group titles left out."""
    _, _, after = README.partition(f"| {first_header} |")
    rows = [line.strip("|").split("|") for line in after.split("\n\n")[0].splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows if row[1].strip()]


def code(cell: str) -> str:
    """What stands between backticks; an italic word, such as _(empty)_, stands for nothing."""
    match = re.fullmatch(r"`([^`]+)`", cell)
    return match[1] if match else ""


def as_text(value: object) -> str:
    """A value of the settings file as one writes it into a variable."""
    if isinstance(value, list):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def defaults() -> dict[str, str]:
    """Every variable and the value that the settings file gives it."""

    def flat(table: dict) -> dict:
        return {k: v for key, value in table.items() for k, v in (flat(value) if isinstance(value, dict) else {key: value}).items()}

    in_file = flat(tomllib.loads(SETTINGS_FILE.read_text(encoding="utf-8")))
    return {name: as_text(in_file.get(name.lower(), "")) for name in KEYS} | OF_RUN_SH


def test_table_of_variables_has_every_variable_once_in_the_order_of_the_file():
    names = [code(row[0]) for row in table_rows("Variable")]
    assert names == [*KEYS, *OF_RUN_SH]


@pytest.mark.parametrize("row", table_rows("Variable"), ids=lambda row: code(row[0]))
def test_table_of_variables_gives_the_defaults_of_the_file(row):
    name, stated = code(row[0]), code(row[1])
    default = defaults()[name]
    try:
        assert math.isclose(float(stated), float(default), abs_tol=0)
    except ValueError:
        assert stated == default
    assert row[2], f"{name} has no meaning"


def test_compose_passes_every_variable_and_no_other():
    environment = COMPOSE["services"]["loracat"]["environment"]
    assert environment == {name: f"${{{name}:-}}" for name in [*KEYS, *OF_RUN_SH] if name not in NOT_IN_COMPOSE}
    assert COMPOSE["services"]["loracat-cpu"]["environment"] == environment


def test_table_of_exit_codes_is_that_of_the_program():
    stated = {int(number) for row in table_rows("Code") for number in row[0].split(",")}
    failures = {kind.exit_code for kind in (*errors.LoracatError.__subclasses__(), errors.MemoryShort)}
    stops = {errors.Stopped(signum).exit_code for signum in (signal.SIGINT, signal.SIGTERM)}
    assert stated == {errors.EXIT_DONE, errors.EXIT_BUG} | failures | stops


def test_keys_of_the_node_table_are_those_the_collector_knows():
    assert sorted(code(row[0]) for row in table_rows("Key")) == sorted(CONFIG_KEYS)


def test_model_files_of_the_workflow_are_listed_with_their_folders():
    folders = {"unet_name": "diffusion_models", "lora_name": "loras", "clip_name": "text_encoders", "vae_name": "vae"}
    workflow = json.loads((REPOSITORY / "workflow_api.json").read_text(encoding="utf-8"))
    inputs = [item for node in workflow.values() for item in node["inputs"].items()]
    loaded = {(value, folders[name]) for name, value in inputs if name in folders}
    assert {(code(row[0]), code(row[1])) for row in table_rows("File")} == loaded


@pytest.mark.parametrize("path", ["face_reference.png", "prompts.json", ".env", ".venv/bin/python", "demo/workspace/face.png"])
def test_what_a_user_brings_or_makes_is_ignored_by_git(path):
    assert is_ignored(path)


@pytest.mark.parametrize("folder", ["dataset", "dataset/images", "output", "output/lora", "models"])
def test_mounted_folders_are_ignored_by_git_but_for_their_marks(folder):
    for name in ("a.png", "a folder/a.txt", ".hidden/a.jsonl"):
        assert is_ignored(f"{folder}/{name}")
    tracked = git("ls-files", folder).stdout.split()
    assert tracked
    assert all(name.endswith("/.gitkeep") for name in tracked)


def test_paths_that_readme_names_exist_or_are_made_by_a_run():
    in_other_folders = {"model_index.json", "metrics.jsonl", "training_config_resolved.toml", "models/loras"}
    top = {name.split("/")[0] for name in git("ls-files").stdout.splitlines()}
    quoted = set(re.findall(r"`([\w./-]+)`", README)) - in_other_folders
    with_folders = {name for name in quoted if "/" in name and name.split("/")[0] in top}
    without = {name for name in quoted if re.fullmatch(r"[\w-]+\.(md|json|jsonl|toml|yml|txt|sh|py)", name)}
    assert {"scripts/run.sh", "scripts/training/"} <= with_folders
    assert "docker-compose.yml" in without
    named = sorted(with_folders | without)
    assert [name for name in named if not (REPOSITORY / name).exists() and not is_ignored(f"{name}/")] == []


def test_make_targets_that_readme_names_exist():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", README, re.MULTILINE))
    assert {"demo", "test", "check", "clean"} <= named <= targets


def test_links_within_readme_lead_somewhere():
    titles = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link.removeprefix("#") in anchors if link.startswith("#") else (REPOSITORY / link).exists() or "://" in link, link


def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)


def is_ignored(path: str) -> bool:
    """Whether git would leave `path` out."""
    return git("check-ignore", "--quiet", "--no-index", path).returncode == 0
