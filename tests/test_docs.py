"""README.md, docs/ and the files next to them describe what the program does."""

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
from common.settings import REPOSITORY, SETTINGS_FILE, VERSION, all_keys
from training.config import TrainSettings

PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
        *sorted((REPOSITORY / "docs").glob("*.md")),
    )
}
README = PAGES["README.md"]
ALL_PAGES = "\n".join(PAGES.values())
MOST_LINES_OF_README = 200
RUN_SH = (REPOSITORY / "scripts" / "run.sh").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8"))
SECTIONS = (ProjectSettings, CollectSettings, CaptionSettings, TrainSettings)

KEYS = {key.name.upper(): key for section in SECTIONS for key in all_keys(section)}
OF_RUN_SH = dict(re.findall(r"\$\{((?!LORACAT_)[A-Z_]+):-(\w*)", RUN_SH))
"""Variables that run.sh reads itself, with the value it uses for an empty one."""
NOT_IN_COMPOSE = {"PYTHON"}
"""Set by the image, because the mounted repository may contain a .venv of the host."""


def table_rows(page: str, first_header: str) -> list[list[str]]:
    """The cells of the rows of the page's table with that first header, without group titles."""
    _, _, after = PAGES[page].partition(f"| {first_header} |")
    rows = [line.strip("|").split("|") for line in after.split("\n\n")[0].splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows if row[1].strip()]


def code(cell: str) -> str:
    """The text between backticks; an italic word, such as _(empty)_, counts as empty."""
    match = re.fullmatch(r"`([^`]+)`", cell)
    return match[1] if match else ""


def as_text(value: object) -> str:
    """A value of the settings file as it is written into a variable."""
    if isinstance(value, list):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def defaults() -> dict[str, str]:
    """Every variable and its value in the settings file, in whose comments the rarely needed ones are."""

    def flat(table: dict) -> dict:
        return {k: v for key, value in table.items() for k, v in (flat(value) if isinstance(value, dict) else {key: value}).items()}

    in_file = flat(tomllib.loads(re.sub(r"(?m)^# (?=[a-z]\w* = )", "", SETTINGS_FILE.read_text(encoding="utf-8"))))
    return {name: as_text(in_file.get(name.lower(), "")) for name in KEYS} | OF_RUN_SH


def test_table_of_variables_has_every_variable_once_by_stage_and_subject():
    names = [code(row[0]) for row in table_rows("docs/settings.md", "Variable")]
    assert names == [*KEYS, *OF_RUN_SH]


@pytest.mark.parametrize("row", table_rows("docs/settings.md", "Variable"), ids=lambda row: code(row[0]))
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
    stated = {int(number) for row in table_rows("docs/troubleshooting.md", "Code") for number in row[0].split(",")}
    failures = {kind.exit_code for kind in (*errors.LoracatError.__subclasses__(), errors.MemoryShort)}
    stops = {errors.Stopped(signum).exit_code for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)}
    assert stated == {errors.EXIT_DONE, errors.EXIT_BUG} | failures | stops


def test_keys_of_the_node_table_are_those_the_collector_knows():
    assert sorted(code(row[0]) for row in table_rows("docs/workflows.md", "Key")) == sorted(CONFIG_KEYS)


def test_model_files_of_the_workflow_are_listed_with_their_folders():
    folders = {"unet_name": "diffusion_models", "lora_name": "loras", "clip_name": "text_encoders", "vae_name": "vae"}
    workflow = json.loads((REPOSITORY / "workflow_api.json").read_text(encoding="utf-8"))
    inputs = [item for node in workflow.values() for item in node["inputs"].items()]
    loaded = {(value, folders[name]) for name, value in inputs if name in folders}
    assert {(code(row[0]), code(row[1])) for row in table_rows("docs/workflows.md", "File")} == loaded


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


def test_readme_is_short_and_leads_to_every_page():
    assert len(README.splitlines()) <= MOST_LINES_OF_README
    linked = {link.partition("#")[0] for link in links(README)}
    assert PAGES.keys() - {"README.md"} <= linked


def test_paths_in_the_pages_exist_or_are_created_by_a_run():
    in_other_folders = {"model_index.json", "metrics.jsonl", "training_config_resolved.toml", "models/loras", "main.py"}
    in_other_folders |= {
        "folder.toml",
        "metadata.jsonl",
        "preprocess.json",
        "preprocessor_config.json",
        "config.json",
        "samples.json",
        "world.json",
    }
    top = {name.split("/")[0] for name in git("ls-files").stdout.splitlines()}
    spans = {word for span in re.findall(r"`([^`\n]+)`", ALL_PAGES) for word in span.split()}
    quoted = {word for word in spans if re.fullmatch(r"[\w./-]+", word)} - in_other_folders
    with_folders = {name for name in quoted if "/" in name and name.split("/")[0] in top}
    without = {name for name in quoted if re.fullmatch(r"[\w-]+\.(md|json|jsonl|toml|yml|txt|sh|py)", name)}
    assert {"scripts/run.sh", "scripts/training/"} <= with_folders
    assert "docker-compose.yml" in without
    named = sorted(with_folders | without)
    assert [name for name in named if not (REPOSITORY / name).exists() and not is_ignored(f"{name}/")] == []


def test_flags_in_the_pages_are_those_of_run_sh():
    usage = re.search(r'^usage="(.*?)"$', RUN_SH, re.MULTILINE | re.DOTALL)[1]
    named = set(re.findall(r"(?:loracat|loracat-cpu|run\.sh)((?: --[a-z]+)+)", ALL_PAGES))
    flags = {flag for group in named for flag in group.split()}
    assert {"--check", "--version", "--caption", "--train"} <= flags
    assert flags <= set(re.findall(r"--[a-z]+", usage))


def test_functions_and_classes_in_the_pages_exist():
    named = re.findall(r"`(\w+)` in `([\w./]+\.py)`", ALL_PAGES)
    assert len(named) >= 5
    for name, path in named:
        assert re.search(rf"^(def|class) {name}\b", (REPOSITORY / path).read_text(encoding="utf-8"), re.MULTILINE), (
            f"{path}: {name}"
        )


def test_make_targets_in_the_pages_exist():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", ALL_PAGES, re.MULTILINE))
    assert {"demo", "test", "check", "clean"} <= named <= targets


def test_every_make_target_is_described():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split():
        assert f"make {target}" in ALL_PAGES, target


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_a_file_or_to_a_title_in_it(page):
    for link in links(PAGES[page]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_link_to_a_missing_title_would_be_found():
    assert anchors("# Stop and resume\n## Why diffusers?\n") == {"stop-and-resume", "why-diffusers"}
    assert links("see [this](page.md#a) and [that](https://example.org)") == ["page.md#a", "https://example.org"]


def test_messages_quoted_in_troubleshooting_are_in_the_code():
    text = PAGES["docs/troubleshooting.md"]
    ours = text[text.index("## ComfyUI") : text.index("## Exit codes")]
    quoted = re.findall(r"^\*\*`([^`]+)`\.\*\*", ours, re.MULTILINE)
    assert len(quoted) >= 2
    code = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "scripts").rglob("*.py"))
    assert [message for message in quoted if message not in code] == []


def test_benchmark_lines_that_readme_asks_for_are_those_that_are_printed():
    section = README[README.index("## Status") : README.index("## Why diffusers")]
    asked = re.findall(r"`([^`]+)`", section[section.index("paste these lines") :])
    printed = "\n".join((REPOSITORY / "benchmarks" / name).read_text(encoding="utf-8") for name in ("train.py", "step.py"))
    lines = [line for line in asked if not line.startswith("docker ")]
    assert len(lines) >= 5
    assert [line for line in lines if f'"{line}' not in printed] == []


@pytest.mark.parametrize("row", table_rows("CONTRIBUTING.md", "What"), ids=lambda row: code(row[1]))
def test_recipes_list_exactly_the_files_that_their_examples_touch(row):
    example, listed = code(row[1]), re.findall(r"`([^`]+)`", row[2])
    found = git("grep", "--files-with-matches", "--ignore-case", "--word-regexp", example, "--", "scripts").stdout.split()
    assert sorted(listed) == sorted(found)


def test_changelog_begins_with_the_version_of_the_program():
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[([^\]]+)\]", changelog, re.MULTILINE)[1] == VERSION


def test_issue_templates_ask_for_the_preflight_check_and_the_version():
    templates = [path for path in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(templates) == 2
    for path in templates:
        template = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert template.keys() == {"name", "description", "labels", "body"}
        required = {
            item["id"]: item["attributes"]["description"]
            for item in template["body"]
            if item["type"] != "markdown" and item.get("validations", {}).get("required")
        }
        assert "`docker compose run --rm loracat --check`" in required["check"]
        assert "`docker compose run --rm loracat --version`" in required["version"]


def test_ci_runs_what_a_contributor_runs_on_both_architectures():
    jobs = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert [step["run"] for step in jobs["checks"]["steps"] if "run" in step] == [".ci/run"]
    for job in jobs.values():
        assert job["strategy"]["matrix"]["runner"] == ["ubuntu-24.04", "ubuntu-24.04-arm"]
        assert job["runs-on"] == "${{ matrix.runner }}"


def test_text_files_have_unix_line_ends_in_every_clone():
    files = [line.split("\t") for line in git("ls-files", "--eol").stdout.splitlines()]
    assert files
    for attributes, name in files:
        in_index, _, rule = attributes.split(maxsplit=2)
        normalized = rule.strip() == "attr/text=auto eol=lf" and in_index in ("i/lf", "i/none", "i/-text")
        assert normalized or rule.strip() == "attr/-text", name


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the titles of a page."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)


def is_ignored(path: str) -> bool:
    """Whether git ignores `path`."""
    return git("check-ignore", "--quiet", "--no-index", path).returncode == 0
