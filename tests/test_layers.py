"""Which module may import which, read the environment or catch everything, and what no file of the repository may contain.

The rules select modules by pattern and state which modules they select, so that none of them can go empty after a rename.
"""

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
MODULES = {
    path.relative_to(SCRIPTS).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in sorted(SCRIPTS.rglob("*.py"))
}
MAINS = [name for name, path in MODULES.items() if path.parent == SCRIPTS]
STAGE_MAINS = {"collect_images": "collecting", "caption_images": "captioning", "train_lora": "training"}
"""What run.sh runs, and the package of each."""
PACKAGES = {name.partition(".")[0] for name, path in MODULES.items() if path.parent != SCRIPTS}
STAGES = sorted(PACKAGES - {"common"})
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "safetensors"}
"""Packages that take seconds to import, or import torch."""


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(nodes: Iterable[ast.AST]) -> set[str]:
    """The modules that `nodes` import; `from package import module` counts as `package.module`."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import: {ast.unparse(node)}"
            modules = {f"{node.module}.{name.name}" for name in node.names} & MODULES.keys()
            found |= modules or {node.module}
    return found


IMPORTS = {name: imports_of(ast.walk(parsed(path))) for name, path in MODULES.items()}
OURS = {name: imports & MODULES.keys() for name, imports in IMPORTS.items()}


def top(name: str) -> str:
    return name.split(".")[0]


def everything_below(name: str) -> set[str]:
    """All modules and libraries that the module can import, directly or through others, at any time."""
    found, waiting = set(), [name]
    while waiting:
        for imported in IMPORTS.get(waiting.pop(), ()):
            if imported not in found:
                found.add(imported)
                waiting.append(imported)
    return found


def test_patterns_select_modules():
    """What the other tests iterate over."""
    assert STAGE_MAINS.keys() <= set(MAINS)
    assert set(STAGE_MAINS.values()) <= set(STAGES)
    for package in PACKAGES:
        assert len(modules_of(package)) >= 2, package
    for main, stage in STAGE_MAINS.items():
        assert {"common", stage} <= {top(name) for name in OURS[main]}, main


def modules_of(package: str) -> list[str]:
    return [name for name in MODULES if top(name) == package]


def test_no_circular_imports():
    for name in MODULES:
        assert name not in everything_below(name)


def test_no_module_imports_a_main():
    assert [(name, ours) for name, ours in OURS.items() if ours & set(MAINS)] == []


@pytest.mark.parametrize("stage", STAGES)
def test_stages_import_only_themselves_and_common(stage):
    for name in modules_of(stage):
        assert {top(imported) for imported in OURS[name]} <= {stage, "common"}, name


@pytest.mark.parametrize("main", MAINS)
def test_each_main_imports_only_one_stage_and_common(main):
    stages = {top(name) for name in OURS[main]} - {"common"}
    assert stages <= {STAGE_MAINS[main]} if main in STAGE_MAINS else len(stages) <= 1


def test_common_imports_nothing_above_it():
    for name in modules_of("common"):
        assert {top(imported) for imported in OURS[name]} <= {"common"}, name


def test_only_training_can_import_torch():
    light = [name for name in MODULES if top(name) != "training" and not any(top(ours) == "training" for ours in OURS[name])]
    assert {"collect_images", "caption_images"} <= set(light)
    assert [(name, found) for name in light if (found := HEAVY & {top(each) for each in everything_below(name)})] == []


TRAINING_LAYERS = (
    ("training.config", "training.models"),
    ("training.method", "training.system"),
    ("training.data", "training.lora_files"),
    ("training.plan", "training.engine"),
    ("training.memory_budget", "training.loop", "training.initial_lora"),
    ("training.callbacks",),
    ("training.run",),
    ("training.job",),
    ("training.lora_metadata",),
    ("training.results", "training.measurement", "training.preparation", "training.first_step"),
    ("training.rehearsal",),
    ("training.trainer", "training.preflight"),
)
"""Modules and packages of the training stage, lowest layer first. Each may import lower layers and its own package."""
PARTS_OF_TRAINING = {part: layer for layer, parts in enumerate(TRAINING_LAYERS) for part in parts}


def part_of_training(name: str) -> str:
    return ".".join(name.split(".")[:2])


def test_layers_contain_every_part_of_training():
    assert {part_of_training(name) for name in MODULES if top(name) == "training"} == {*PARTS_OF_TRAINING, "training"}


@pytest.mark.parametrize("part", PARTS_OF_TRAINING)
def test_training_imports_only_lower_layers(part):
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


def test_training_checks_its_settings_before_it_imports_torch():
    program = "import sys, train_lora; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], cwd=SCRIPTS, capture_output=True, text=True, check=True)
    assert {"train_lora", "common", "training"} <= set(done.stdout.split())
    assert HEAVY.isdisjoint(done.stdout.split())


@pytest.mark.parametrize("main", STAGE_MAINS)
def test_ctrl_c_while_libraries_are_imported_prints_no_traceback(main, tmp_path):
    """With a library that takes long to import."""
    (tmp_path / "tomli_w.py").write_text('import time\nprint("importing", flush=True)\ntime.sleep(60)\n')
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": str(tmp_path)}}
    process = subprocess.Popen([sys.executable, MODULES[main]], **pipes)
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == -signal.SIGINT


def test_only_three_modules_read_the_environment():
    """Settings, the launcher, and what torch and Triton read."""
    users = {name for name, path in MODULES.items() if environment_names(path) & {"environ", "environb", "getenv", "getenvb"}}
    assert users == {"common.settings", "training.system.environment", "training.system.processes"}
    writers = {name for name, path in MODULES.items() if environment_names(path) & {"putenv", "unsetenv"}}
    assert writers == {"training.system.device"}


def environment_names(path: Path) -> set[str]:
    """The names in a module that could belong to `os`: attributes of anything, and what is imported from os."""
    nodes = list(ast.walk(parsed(path)))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    imported = {name.name for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "os" for name in node.names}
    return attributes | imported


def test_only_four_modules_catch_every_exception():
    """Where a failure becomes an exit code or is passed to the code that waits for the result, and where a package raises
    Exception itself; the exception is always used."""
    handlers = {
        name: [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ExceptHandler) and is_broad(node)]
        for name, path in MODULES.items()
    }
    assert {name for name, broad in handlers.items() if broad} == {
        "common.clip_tokens",
        "common.errors",
        "collecting.pool",
        "training.system.processes",
    }
    for broad in handlers.values():
        for handler in broad:
            used = {node.id for statement in handler.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
            assert handler.name in used


def test_no_module_suppresses_every_exception():
    for name, path in MODULES.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and "suppress" in ast.unparse(node.func):
                assert not {"Exception", "BaseException"} & {ast.unparse(argument) for argument in node.args}, name


def is_broad(handler: ast.ExceptHandler) -> bool:
    caught = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else {"BaseException"}
    return bool(caught & {"Exception", "BaseException"})


def test_repository_mentions_no_path_outside_itself():
    """Everything that the files mention is in every clone."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    outside = re.compile(rb"(?<![\w.])/(work|mnt|Users)/\w|(?<![\w./])/home/\w+/\w|\.\./\.\./\.\.")
    mentioning = [name for name in tracked.split("\0") if name and outside.search((REPOSITORY / name).read_bytes())]
    assert [name for name in mentioning if name != "tests/test_layers.py"] == []


def test_libraries_that_the_program_imports_are_pinned():
    """A package that is only another one's dependency may disappear with its next version."""
    requirements = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    optional = {"opencv-python-headless"}  # for FACE_MODEL=sface; the tests pin it
    assert optional <= {line.partition("==")[0] for line in (REPOSITORY / "requirements-dev.txt").read_text().splitlines()}
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in requirements if not line.startswith("#")} | optional
    from_base_image = {"torch", "triton", "numpy"}
    imported = (
        {top(name) for imports in IMPORTS.values() for name in imports}
        - sys.stdlib_module_names
        - {top(module) for module in MODULES}
    )
    distributions = {
        "dlib": ["dlib-bin"],
        "cv2": ["opencv-python-headless"],
    } | packages_distributions()  # the wheel does not list its module
    packages = {module: distributions.get(module, [module]) for module in imported - from_base_image}
    missing = {module for module, names in packages.items() if not {name.lower().replace("_", "-") for name in names} & pinned}
    assert missing == set()
