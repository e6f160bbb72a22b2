"""Who may import whom, who may read the environment, and what no file of the repository may say."""

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from settings import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"
MAINS = ("collect_images", "caption_images", "train_lora")
BOTTOM = ("settings", "sections", "setting_values", "dataset_folder", "errors", "pictures", "prefetch", "locks")
STAGES = ("collecting", "captioning", "training")
ROOMS = {path.relative_to(SCRIPTS).with_suffix("").as_posix().replace("/", "."): path for path in sorted(SCRIPTS.rglob("*.py"))}
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "safetensors"}
"""What takes seconds to import, or brings torch with it."""


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(nodes: Iterable[ast.AST]) -> set[str]:
    """Every module that some of `nodes` import; `from package import room` counts as `package.room`."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"rooms are imported by their whole name: {ast.unparse(node)}"
            rooms = {f"{node.module}.{name.name}" for name in node.names} & ROOMS.keys()
            found |= rooms or {node.module}
    return found


IMPORTS = {name: imports_of(ast.walk(parsed(path))) for name, path in ROOMS.items()}
OURS = {name: imports & ROOMS.keys() for name, imports in IMPORTS.items()}


def top(name: str) -> str:
    return name.split(".")[0]


def everything_below(name: str) -> set[str]:
    """All modules that an import of the room brings in by rooms of ours, its own imports of libraries included."""
    found, waiting = set(), [name]
    while waiting:
        for imported in IMPORTS.get(waiting.pop(), ()):
            if imported not in found:
                found.add(imported)
                waiting.append(imported)
    return found


def test_every_room_was_read():
    assert {*MAINS, *BOTTOM, "training.step", "collecting.comfyui", "captioning.tagger"} <= ROOMS.keys()
    assert OURS["collect_images"] >= {"collecting.plan", "settings"}


def test_no_room_imports_itself_by_a_detour():
    for name in ROOMS:
        assert name not in everything_below(name)


def test_mains_are_imported_by_nobody():
    assert [(name, ours) for name, ours in OURS.items() if ours & set(MAINS)] == []


@pytest.mark.parametrize("stage", STAGES)
def test_stages_know_only_themselves_and_the_bottom(stage):
    allowed = {stage, *BOTTOM}
    rooms = [name for name in ROOMS if top(name) == stage]
    assert rooms
    for name in rooms:
        assert {top(imported) for imported in OURS[name]} <= allowed, name


def test_each_main_uses_its_own_stage_and_the_bottom():
    """And captioning's the training settings, to know what training can use: pictures of what size, captions of what length."""
    for main, stage in zip(MAINS, STAGES, strict=True):
        allowed = {"training.config"} if main == "caption_images" else set()
        assert {top(name) for name in OURS[main] - allowed} <= {stage, *BOTTOM}


def test_bottom_knows_nothing_above_it():
    for name in BOTTOM:
        assert OURS[name] <= set(BOTTOM), name


@pytest.mark.parametrize("name", ["dataset_folder", "errors", "prefetch"])
def test_contract_and_errors_need_the_standard_library_only(name):
    assert {top(imported) for imported in IMPORTS[name]} <= sys.stdlib_module_names
    assert OURS[name] == set()


@pytest.mark.parametrize("main", MAINS[:2])
def test_collecting_and_captioning_never_import_torch(main):
    assert {top(name) for name in everything_below(main)}.isdisjoint(HEAVY)


@pytest.mark.parametrize("name", ["training.buckets", "training.draws", "training.objective", "training.config", "training.plan"])
def test_pure_rooms_stay_below_the_machinery(name):
    above = {
        "training.task",
        "training.carry_out",
        "training.saving",
        "training.loop",
        "training.step",
        "training.cache",
        "training.models",
        "training.export",
    }
    assert everything_below(name).isdisjoint(above)


def test_loop_stands_above_the_step_and_knows_no_networks():
    assert "training.loop" not in everything_below("training.step")
    assert "training.models" not in everything_below("training.loop")


def test_a_wrong_setting_of_training_is_refused_before_torch_is_imported():
    at_first = imports_of(parsed(ROOMS["train_lora"]).body)
    below = at_first.union(*(everything_below(name) for name in at_first))
    assert {top(name) for name in below}.isdisjoint(HEAVY)


@pytest.mark.parametrize("main", MAINS)
def test_ctrl_c_while_libraries_are_imported_shows_no_traceback(main, tmp_path):
    """With a library whose import takes long."""
    (tmp_path / "tomli_w.py").write_text('import time\nprint("importing", flush=True)\ntime.sleep(60)\n')
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": str(tmp_path)}}
    process = subprocess.Popen([sys.executable, ROOMS[main]], **pipes)
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == -signal.SIGINT


def test_only_settings_read_the_environment():
    readers = {name for name, path in ROOMS.items() if reads_environment(path)}
    assert "settings" in readers
    assert readers <= {"settings", "training.distributed"}


def reads_environment(path: Path) -> bool:
    nodes = ast.walk(parsed(path))
    return any(isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv") for node in nodes)


def test_nobody_swallows_every_exception():
    """`except Exception` stands where a failure becomes an exit code, or is handed to the one that waits."""
    handlers = {
        name: [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ExceptHandler) and is_broad(node)]
        for name, path in ROOMS.items()
    }
    assert {name for name, broad in handlers.items() if broad} <= {"errors", "collecting.fleet", "training.aside"}
    for broad in handlers.values():
        for handler in broad:
            used = {node.id for statement in handler.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
            assert handler.name in used


def is_broad(handler: ast.ExceptHandler) -> bool:
    caught = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else {"BaseException"}
    return bool(caught & {"Exception", "BaseException"})


def test_repository_names_no_place_outside_itself():
    """Whoever has a clone has everything that its files speak of."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    outside = re.compile(rb"(?<![\w.])/(work|mnt|Users)/\w|(?<![\w./])/home/\w+/\w|\.\./\.\./\.\.")
    speaking = [name for name in tracked.split("\0") if name and outside.search((REPOSITORY / name).read_bytes())]
    assert [name for name in speaking if name != "tests/test_layers.py"] == []


def test_libraries_that_the_program_imports_are_pinned():
    """What came as another package's dependency may be gone with its next version."""
    requirements = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in requirements if not line.startswith("#")}
    of_the_base = {"torch", "triton", "numpy"}
    imported = (
        {top(name) for imports in IMPORTS.values() for name in imports} - sys.stdlib_module_names - {top(room) for room in ROOMS}
    )
    distributions = packages_distributions()
    packages = {module: distributions.get(module, [module]) for module in imported - of_the_base}
    missing = {module for module, names in packages.items() if not {name.lower().replace("_", "-") for name in names} & pinned}
    assert missing == set()
