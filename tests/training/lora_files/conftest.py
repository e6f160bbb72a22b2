"""Shared by the tests of LoRA files: files of every kind, and the tool as a user runs it."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lora_kinds import Drawn
from safetensors.torch import save_file

import lora_tool
from common.errors import run_main


@pytest.fixture
def drawn() -> Drawn:
    return Drawn()


@pytest.fixture
def save(tmp_path) -> Callable[..., Path]:
    """Write `layers` (name -> tensors) as a LoRA file in `tmp_path`."""

    def write(
        name: str, layers: dict[str, dict], metadata: dict[str, str] | None = None, dtype: torch.dtype = torch.float32
    ) -> Path:
        tensors = {f"{layer}.{part}": tensor.to(dtype) for layer, parts in layers.items() for part, tensor in parts.items()}
        save_file(tensors, tmp_path / name, metadata)
        return tmp_path / name

    return write


@pytest.fixture
def tool(capsys) -> Callable[..., subprocess.CompletedProcess]:
    """Run lora_tool.py in this process. It must never print a traceback, nor more than one line for an error."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        threads = torch.get_num_threads()
        try:
            code = run_main(lora_tool.TOOL, lambda: lora_tool.main([str(argument) for argument in arguments]))
        finally:
            torch.set_num_threads(threads)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        if code:
            assert len(output.err.splitlines()) == 1
        return subprocess.CompletedProcess(arguments, code, output.out, output.err)

    return run
