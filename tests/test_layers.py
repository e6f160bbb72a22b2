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

from common.settings import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"
MAINS = ("collect_images", "caption_images", "train_lora")
STAGES = ("collecting", "captioning", "training")
MODULES = {
    path.relative_to(SCRIPTS).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in sorted(SCRIPTS.rglob("*.py"))
}
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "safetensors"}
"""What takes seconds to import, or brings torch with it."""


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(nodes: Iterable[ast.AST]) -> set[str]:
    """Every module that some of `nodes` import; `from package import module` counts as `package.module`."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"modules are imported by their whole name: {ast.unparse(node)}"
            modules = {f"{node.module}.{name.name}" for name in node.names} & MODULES.keys()
            found |= modules or {node.module}
    return found


IMPORTS = {name: imports_of(ast.walk(parsed(path))) for name, path in MODULES.items()}
OURS = {name: imports & MODULES.keys() for name, imports in IMPORTS.items()}


def top(name: str) -> str:
    return name.split(".")[0]


def everything_below(name: str) -> set[str]:
    """All modules that an import of the module brings in by modules of ours, its own imports of libraries included."""
    found, waiting = set(), [name]
    while waiting:
        for imported in IMPORTS.get(waiting.pop(), ()):
            if imported not in found:
                found.add(imported)
                waiting.append(imported)
    return found


def test_every_module_was_read():
    assert {*MAINS, "common.settings", "training.engine.step", "collecting.client", "captioning.wd14"} <= MODULES.keys()
    assert OURS["collect_images"] >= {"collecting.jobs", "common.settings"}


def test_no_module_imports_itself_by_a_detour():
    for name in MODULES:
        assert name not in everything_below(name)


def test_mains_are_imported_by_no_module():
    assert [(name, ours) for name, ours in OURS.items() if ours & set(MAINS)] == []


@pytest.mark.parametrize("stage", STAGES)
def test_stages_know_only_themselves_and_common(stage):
    modules = [name for name in MODULES if top(name) == stage]
    assert modules
    for name in modules:
        assert {top(imported) for imported in OURS[name]} <= {stage, "common"}, name


def test_each_main_uses_its_own_stage_and_common():
    for main, stage in zip(MAINS, STAGES, strict=True):
        assert {top(name) for name in OURS[main]} <= {stage, "common"}


def test_common_imports_nothing_above_it():
    modules = [name for name in MODULES if top(name) == "common"]
    assert modules
    for name in modules:
        assert {top(imported) for imported in OURS[name]} <= {"common"}, name


@pytest.mark.parametrize("main", MAINS[:2])
def test_collecting_and_captioning_never_import_torch(main):
    assert {top(name) for name in everything_below(main)}.isdisjoint(HEAVY)


TRAINING_LAYERS = (
    ("training.config", "training.models"),
    ("training.method", "training.system"),
    ("training.data",),
    ("training.plan", "training.monitor", "training.engine"),
    ("training.memory_budget", "training.loop"),
    ("training.state",),
    ("training.job",),
    ("training.trainer", "training.preflight"),
)
"""Modules and packages of the training stage, the lowest first. Each may import those of lower layers, and its own package."""
PARTS_OF_TRAINING = {part: layer for layer, parts in enumerate(TRAINING_LAYERS) for part in parts}


def part_of_training(name: str) -> str:
    return ".".join(name.split(".")[:2])


def test_layers_name_every_part_of_training():
    assert {part_of_training(name) for name in MODULES if top(name) == "training"} == {*PARTS_OF_TRAINING, "training"}


@pytest.mark.parametrize("part", PARTS_OF_TRAINING)
def test_training_imports_only_go_down(part):
    allowed = {other for other, layer in PARTS_OF_TRAINING.items() if layer < PARTS_OF_TRAINING[part] or other == part}
    for name in MODULES:
        if part_of_training(name) == part:
            assert {part_of_training(ours) for ours in OURS[name] if top(ours) == "training"} <= allowed, name


def test_only_the_choice_of_an_engine_imports_the_fast_one():
    importers = {name for name, ours in OURS.items() if any(module.startswith("training.engine.fast") for module in ours)}
    assert {name for name in importers if not name.startswith("training.engine.fast.")} == {"training.engine"}


def test_triton_is_imported_by_the_fast_engine_alone():
    importers = {name for name, imports in IMPORTS.items() if "triton" in {top(imported) for imported in imports}}
    assert importers
    assert all(name.startswith("training.engine.fast.") for name in importers)


def test_a_wrong_setting_of_training_is_refused_before_torch_is_imported():
    at_first = imports_of(parsed(MODULES["train_lora"]).body)
    below = at_first.union(*(everything_below(name) for name in at_first))
    assert {top(name) for name in below}.isdisjoint(HEAVY)


@pytest.mark.parametrize("main", MAINS)
def test_ctrl_c_while_libraries_are_imported_shows_no_traceback(main, tmp_path):
    """With a library whose import takes long."""
    (tmp_path / "tomli_w.py").write_text('import time\nprint("importing", flush=True)\ntime.sleep(60)\n')
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": str(tmp_path)}}
    process = subprocess.Popen([sys.executable, MODULES[main]], **pipes)
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == -signal.SIGINT


def test_only_settings_read_the_environment():
    readers = {name for name, path in MODULES.items() if reads_environment(path)}
    assert "common.settings" in readers
    assert readers <= {"common.settings", "training.system.launcher"}


def reads_environment(path: Path) -> bool:
    nodes = ast.walk(parsed(path))
    return any(isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv") for node in nodes)


def test_nobody_swallows_every_exception():
    """`except Exception` stands where a failure becomes an exit code, or is handed to the one that waits."""
    handlers = {
        name: [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ExceptHandler) and is_broad(node)]
        for name, path in MODULES.items()
    }
    assert {name for name, broad in handlers.items() if broad} <= {
        "common.errors",
        "collecting.pool",
        "training.system.worker_process",
    }
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
        {top(name) for imports in IMPORTS.values() for name in imports}
        - sys.stdlib_module_names
        - {top(module) for module in MODULES}
    )
    distributions = packages_distributions()
    packages = {module: distributions.get(module, [module]) for module in imported - of_the_base}
    missing = {module for module, names in packages.items() if not {name.lower().replace("_", "-") for name in names} & pinned}
    assert missing == set()
