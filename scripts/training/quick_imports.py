"""Import diffusers, transformers and PEFT without what they bring along for others.

That is torch's compiler, only to mark functions for it, every other network that they know, torchvision, scipy, and sympy
through torch's distributed tensors: most of the seconds before a run begins.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

_SHELLS = (
    "torch._dynamo",
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
)
"""Packages of which only single modules are wanted."""
_WANTED_MODELS = ("auto", "bloom", "clip")
"""Of transformers' hundreds, each file of which it would read for the names in it; PEFT asks for the first two."""
_MARKS = ("allow_in_graph", "assume_constant_result", "disable")
"""Decorators of the compiler, all the same where nothing is compiled."""
_ABSENT = ("scipy", "torchvision")
"""What is used if it is there, for other networks."""


def import_quickly(name: str) -> ModuleType:
    """Import the module `name`; where it asks for more than is offered here, as everybody else does.

    Afterwards what was left out can be imported whole. transformers goes on believing that torch cannot distribute.
    """
    try:
        with _shells(), _few_models():
            return importlib.import_module(name)
    except (ImportError, AttributeError, KeyError, RuntimeError):
        return importlib.import_module(name)


@contextlib.contextmanager
def _shells() -> Iterator[None]:
    """Within this block some packages are empty, and others not there; those that were imported before stay as they are."""
    put = {name: _shell(name) for name in _SHELLS if name not in sys.modules}
    put |= {name: None for name in _ABSENT if name not in sys.modules}
    unmarked = mock.patch.object(torch.compiler, "disable", _unmarked)
    alone = mock.patch.object(torch.distributed, "is_available", return_value=False)
    sys.modules.update(put)
    try:
        with unmarked, alone:
            yield
    finally:
        for name in put:
            sys.modules.pop(name, None)


@contextlib.contextmanager
def _few_models() -> Iterator[None]:
    """Within this block transformers' folder of models seems to hold only those that are wanted. What knows only of them is
    forgotten afterwards, unless transformers was there before."""
    if "transformers" in sys.modules:
        yield
        return
    whole, models = os.scandir, str(Path(importlib.util.find_spec("transformers").origin).with_name("models"))

    def few(folder: str | bytes | int | os.PathLike = ".") -> Iterable[os.DirEntry]:
        entries = whole(folder)
        if str(folder) != models:
            return entries
        with entries:
            return _Entries(entry for entry in entries if entry.name in _WANTED_MODELS or not entry.is_dir())

    try:
        with mock.patch.object(os, "scandir", few):
            yield
    finally:
        for name in ("transformers", "transformers.models"):
            sys.modules.pop(name, None)
        if lists := sys.modules.get("transformers.utils.import_utils"):
            lists.create_import_structure_from_path.cache_clear()
            lists.define_import_structure.cache_clear()


class _Entries(list):
    """What os.scandir answers can be closed."""

    def __enter__(self):
        return iter(self)

    def __exit__(self, *_):
        pass


def _shell(name: str) -> ModuleType:
    """The package without its `__init__`: its modules can be imported."""
    package, *inner = name.split(".")
    shell = ModuleType(name)
    shell.__path__ = [str(Path(importlib.util.find_spec(package).origin).parent.joinpath(*inner))]
    if name == "torch._dynamo":
        vars(shell).update(dict.fromkeys(_MARKS, _unmarked))
    return shell


def _unmarked(function: Callable | None = None, **_: object) -> Callable:
    """A decorator, with or without arguments, that decorates nothing."""
    return _unmarked if function is None else function
