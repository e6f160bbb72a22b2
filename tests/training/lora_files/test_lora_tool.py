"""lora_tool.py with what users get wrong, files that are damaged, and runs that are killed."""

import os
import signal
import subprocess
import time

import pytest
import torch
from lora_kinds import LINEAR, Drawn
from safetensors.torch import load_file, save_file

from common.settings import REPOSITORY
from common.weights import read_header

FLUX = "lora_unet_double_blocks_{}_img_attn_qkv"
SCRIPT = REPOSITORY / "scripts" / "lora_tool.py"


@pytest.fixture
def source(drawn, save):
    return save("a.safetensors", {LINEAR: drawn.lora()[0]})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "required: COMMAND"),
        (("rotate", "a.safetensors"), "invalid choice: 'rotate'"),
        (("show",), "required: LORA"),
        (("resize", "a.safetensors", "--rank", "4"), "required: --output"),
        (("resize", "a.safetensors", "--output", "b.safetensors"), "--rank, --energy or both"),
        (("resize", "a.safetensors", "--rank", "0", "--output", "b.safetensors"), "'0' must be a whole number of at least 1"),
        (("resize", "a.safetensors", "--energy", "95", "--output", "b.safetensors"), "'95' must be a number above 0 and at most 1"),
        (("merge", "a.safetensors", "--weights", "nan", "--output", "b.safetensors"), "'nan' must be a number"),
        (("merge", "a.safetensors", "--weights", "1", "1", "--output", "b.safetensors"), "2 numbers for 1 LoRA files"),
        (("merge", "a.safetensors", "--output", "b.pt"), "must end in .safetensors"),
        (("merge", "a.safetensors", "--output", "b\nc.pt"), "'b\\nc.pt' must be a path without control characters"),
        (("merge", "missing.safetensors", "--output", "b.safetensors"), "missing.safetensors: no such file"),
        (("bake", "missing.safetensors", "a.safetensors", "--output", "b.safetensors"), "no such file or folder"),
        (("merge", "a.safetensors", "--output", "a.safetensors", "--force"), "files are never changed in place"),
        (("merge", "a.safetensors", "--output", "link.safetensors", "--force"), "a link or a device"),
        (("merge", "a.safetensors", "--output", "folder.safetensors", "--force"), "is a folder"),
        (("merge", "a.safetensors", "--output", "there.safetensors"), "exists: choose another name, or replace it with --force"),
    ],
)
def test_wrong_usage_is_one_line_and_changes_nothing(arguments, words, source, tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to("a.safetensors")
    (tmp_path / "there.safetensors").write_text("mine")
    before = {path.name: path.lstat().st_mtime_ns for path in tmp_path.iterdir()}
    refused = tool(*arguments)
    assert (refused.returncode, words in refused.stderr, refused.stderr.count("\n")) == (2, True, 1), refused.stderr
    assert {path.name: path.lstat().st_mtime_ns for path in tmp_path.iterdir()} == before


def truncated(path):
    path.write_bytes(path.read_bytes()[:-10])


def with_nan(path):
    tensors = load_file(path)
    tensors[f"{LINEAR}.lora_up.weight"][0, 0] = torch.nan
    save_file(tensors, path)


def without_up(path):
    save_file({key: tensor for key, tensor in load_file(path).items() if "lora_up" not in key}, path)


def with_other_ranks(path):
    save_file(load_file(path) | {f"{LINEAR}.lora_up.weight": torch.ones(12, 3)}, path)


def of_rank_zero(path):
    save_file({f"{LINEAR}.lora_up.weight": torch.ones(12, 0), f"{LINEAR}.lora_down.weight": torch.ones(0, 8)}, path)


def with_an_alpha_of_two(path):
    save_file(load_file(path) | {f"{LINEAR}.alpha": torch.ones(2)}, path)


def twice(path):
    other = "unet.down_blocks.1.attentions.0.proj_in.lora_B.weight"
    save_file(load_file(path) | {other: torch.ones(12, 4)}, path)


def of_flux(path):
    save_file({f"{FLUX.format(n)}.lora_{end}.weight": torch.ones(4, 4) for n in range(4) for end in ("up", "down")}, path)


def of_integers(path):
    save_file(load_file(path) | {f"{LINEAR}.lora_up.weight": torch.ones(12, 4, dtype=torch.int8)}, path)


def with_oft(path):
    save_file(load_file(path) | {f"{LINEAR}.oft_blocks": torch.ones(2, 2, 2)}, path)


def as_checkpoint(path):
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4)}, path)


def as_embedding(path):
    save_file({"clip_l": torch.ones(4, 8), "clip_g": torch.ones(4, 8)}, path)


def with_a_control_character(path):
    save_file(load_file(path) | {"\x1b[2J.lora_up.weight": torch.ones(2)}, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "is damaged"),
        (with_nan, "lora_up.weight holds NaN or infinity"),
        (without_up, "lacks up"),
        (with_other_ranks, "down [4, 8], up [12, 3]; which do not match"),
        (of_rank_zero, "which do not match"),
        (with_an_alpha_of_two, "alpha"),
        (twice, "holds the same layer twice"),
        (of_flux, "is a LoRA of Flux, not of SDXL"),
        (of_integers, "has the type I8"),
        (with_oft, "of a kind that is not supported"),
        (as_checkpoint, "is a checkpoint, not a LoRA file"),
        (as_embedding, "is a textual inversion embedding"),
        (with_a_control_character, r"\x1b"),
        (lambda path: path.write_text("<html>"), "is a web page"),
        (lambda path: path.write_bytes(b""), "is damaged or not a .safetensors file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is not a regular file"),
        (lambda path: (path.unlink(), path.mkdir()), "is not a regular file"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_files_that_cannot_be_used_are_one_line_and_leave_nothing(damage, words, source, tool, tmp_path):
    damage(source)
    refused = tool("resize", source, "--rank", 2, "--output", tmp_path / "b.safetensors")
    assert (refused.returncode, words in refused.stderr) == (5, True), refused.stderr
    assert "\x1b" not in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


PEFT_LAYER = "unet.down_blocks.1.attentions.0.proj_in"
OUT_OF_PROPORTION = f"the alpha of {PEFT_LAYER} is out of all proportion to its rank"
FOREVER = "which no PEFT adapter needs"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('"r": 4, "lora_alpha": 1' + 400 * "0", OUT_OF_PROPORTION),
        ('"r": 4, "lora_alpha": 1' + 400 * "0" + ', "use_rslora": true', OUT_OF_PROPORTION),
        ('"r": 4, "lora_alpha": 1e308', OUT_OF_PROPORTION),
        ('"r": 4, "lora_alpha": Infinity', OUT_OF_PROPORTION),
        ('"r": 1e-320, "lora_alpha": 4', OUT_OF_PROPORTION),
        ('"r": 4, "lora_alpha": 4, "alpha_pattern": {"(a+)+$": 1}', FOREVER),
        ('"r": 4, "lora_alpha": 4, "rank_pattern": {".*.*.*.*.*.*.*x": 1}', FOREVER),
        ('"r": 4, "lora_alpha": 4, "alpha_pattern": {"(a|b|ab){1,99}c": 1}', FOREVER),
        ('"r": 4, "lora_alpha": 4, "alpha_pattern": {"' + 30 * "(|.)" + 'x": 1}', FOREVER),
        (r'"r": 4, "lora_alpha": 4, "alpha_pattern": {"down_blocks.\\d+.attentions.\\d+.a\\d+.b\\d+.(to_q|to_k)$": 1}', ""),
        ('"r": 4, "lora_alpha": 4, "alpha_pattern": {"a{99999999999999999999}": 1}', ""),
        ('"r": 4, "lora_alpha": 4, "alpha_pattern": {"' + 3000 * "(" + '": 1}', ""),
        ('"r": 4, "lora_alpha": 4, "alpha_pattern": {"(": 1, "[[a]": 1, "\\u0000": 1, "": 4}', ""),
    ],
)
def test_a_hostile_configuration_is_one_line_at_once(config, words, drawn, tool, tmp_path):
    """Expressions that cannot be compiled match no layer."""
    parts, _ = drawn.lora(alpha=None)
    tensors = {f"{PEFT_LAYER}.lora_B.weight": parts["lora_up.weight"], f"{PEFT_LAYER}.lora_A.weight": parts["lora_down.weight"]}
    for key in ("r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern"):
        config = config.replace(f'"{key}"', f'"unet.{key}"')
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": f"{{{config}}}"})
    result = tool("resize", tmp_path / "a.safetensors", "--rank", 2, "--output", tmp_path / "b.safetensors")
    assert (result.returncode, words in result.stderr) == (5 if words else 0, True), result.stderr


def test_values_that_are_too_large_to_compute_with_are_one_line(drawn, save, tool, tmp_path):
    parts, _ = drawn.lora()
    path = save("a.safetensors", {LINEAR: {part: tensor * 1e37 for part, tensor in parts.items()}})
    refused = tool("resize", path, "--rank", 2, "--output", tmp_path / "b.safetensors")
    assert (refused.returncode, "too large to compute with" in refused.stderr) == (5, True), refused.stderr


def test_a_file_that_vanishes_is_one_line(source, tool, monkeypatch):
    def read_and_remove(path):
        header = read_header(path)
        path.unlink()
        return header

    monkeypatch.setattr("training.lora_files.reading.read_header", read_and_remove)
    refused = tool("show", source)
    assert refused.returncode == 6
    assert refused.stderr.startswith(f"lora_tool: {source}: No such file or directory: ")


def test_a_few_layers_that_sdxl_lacks_are_left_out_by_name(drawn, save, tool, tmp_path):
    layers = {f"lora_te1_text_model_encoder_layers_{n}_mlp_fc1": drawn.lora()[0] for n in range(12)}
    source = save("a.safetensors", layers | {"lora_te1_text_model_encoder_layers_99_mlp_fc1": drawn.lora()[0]})
    done = tool("merge", source, "--output", tmp_path / "b.safetensors")
    assert "a.safetensors: left out: lora_te1_text_model_encoder_layers_99_mlp_fc1" in done.stdout
    assert len(load_file(tmp_path / "b.safetensors")) == 36


def test_force_replaces_the_output(source, tool, tmp_path):
    (tmp_path / "b.safetensors").write_text("old")
    assert tool("merge", source, "--output", tmp_path / "b.safetensors", "--force").returncode == 0
    assert load_file(tmp_path / "b.safetensors")


def test_a_full_disk_leaves_no_file(source, tool, mount_tmpfs, tmp_path, tiny_single_file):
    mount_tmpfs(tmp_path / "small", "size=1m")
    refused = tool("bake", tiny_single_file, source, "--output", tmp_path / "small" / "b.safetensors")
    assert (refused.returncode, "GiB are free: free disk space" in refused.stderr) == (6, True)
    assert list((tmp_path / "small").iterdir()) == []


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_bake_that_is_stopped_leaves_no_file_of_that_name(
    signum, code, forked_python, source, save, tool, tiny_single_file, tmp_path
):
    """The unfinished file of a process that was killed is removed by the next run; one of another program stays."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / ".download.part").write_text("of another program")
    (folder / ".12345678.part").write_text("of another program")
    slow = save("slow.safetensors", {LINEAR: Drawn(1).lora(64, 64, rank=32)[0]})
    arguments = ["bake", tiny_single_file, *[slow] * 2000, "--output", folder / "b.safetensors"]
    with subprocess.Popen([forked_python, SCRIPT, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if any(path.stat().st_size > 2**20 for path in folder.glob(".*.part")):
                process.send_signal(signum)
                break
            time.sleep(0.002)
        assert process.wait(30) == code
    left = {path.name for path in folder.iterdir()} - {".download.part", ".12345678.part"}
    assert len(left) == (1 if signum == signal.SIGKILL else 0)
    assert tool("merge", source, "--output", folder / "c.safetensors").returncode == 0
    until = time.monotonic() + 30  # the fork server may take a moment to end the process
    while time.monotonic() < until and any((folder / name).exists() for name in left):
        assert tool("merge", source, "--output", folder / "c.safetensors", "--force").returncode == 0
    assert {path.name for path in folder.iterdir()} == {".download.part", ".12345678.part", "c.safetensors"}
