"""Look into LoRA files of SDXL and make new ones: another rank, the sum of several, a checkpoint with them baked in."""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from common.errors import ResourceError, SettingsError, as_loracat_error, exit_on_signals, run_main, stop_on_signals
from common.settings import VERSION

TOOL = "lora_tool"
MOST_WEIGHT = 1000


class Parser(argparse.ArgumentParser):
    """Wrong usage becomes a SettingsError, as in the other programs."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see {self.prog} --help")


def main(argv: list[str]) -> None:
    stop_on_signals()
    given = parse(argv)
    try:
        run(given)
    except OSError as error:
        if as_loracat_error(error):
            raise
        place = f"{error.filename}: " if error.filename else ""
        raise ResourceError(f"{place}{error.strerror or error}: run the command again when the disk can be used") from None


def run(given: argparse.Namespace) -> None:
    """Run the command."""
    with exit_on_signals(TOOL):
        import torch

        from training.lora_files.baking import bake
        from training.lora_files.combining import Reduction, combine
        from training.lora_files.reading import read_lora
        from training.lora_files.summary import summarize
        from training.lora_files.writing import WRITTEN_TYPES, require_output

    torch.set_num_threads(1)  # the matrices are small: on a busy machine several threads take 30 times as long
    if given.command != "show":
        require_output(given.output, [*given.files, *([given.checkpoint] if given.command == "bake" else [])], given.force)
    files = [read_lora(path) for path in given.files]
    if given.command == "show":
        print("\n\n".join(map(summarize, files)))
    elif given.command == "bake":
        print(f"{given.output}: {bake(given.checkpoint, files, given.weights, given.output, given.force)}")
    else:
        dtype = WRITTEN_TYPES.get(given.dtype)
        reduction = Reduction(given.rank, given.energy)
        result = combine(files, given.weights, given.output, given.command, reduction, dtype, given.force)
        print(f"{given.output}: {result.describe()}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises SettingsError."""
    parser = Parser(prog=f"{TOOL}.py", description=__doc__, epilog="Examples: docs/lora_tool.md")
    parser.add_argument("--version", action="version", version=f"LoRACat {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    show = commands.add_parser("show", help="metadata, and for each block the norm of the change and its energy per rank")
    resize = commands.add_parser("resize", help="a LoRA file of lower rank, by singular values")
    merge = commands.add_parser("merge", help="the weighted sum of several LoRA files as one")
    bake = commands.add_parser("bake", help="a checkpoint, or diffusers folder, with LoRA files applied")
    bake.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a .safetensors file or a diffusers folder of SDXL")
    for command, most in ((show, "+"), (resize, 1), (merge, "+"), (bake, "+")):
        command.add_argument("files", type=Path, nargs=most, metavar="LORA", help="a LoRA file (.safetensors) of any trainer")
    for command in (resize, merge):
        command.add_argument("--rank", type=whole_number, metavar="N", help="the rank of every layer, at most")
        command.add_argument("--energy", type=share, metavar="SHARE", help="keep this share of each layer's energy, such as 0.95")
        command.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="type of the weights (default: as the input)")
    for command in (merge, bake):
        command.add_argument(
            "--weights", type=number, nargs="+", metavar="W", help="a strength for each LoRA file, also negative (default: 1 each)"
        )
    for command in (resize, merge, bake):
        command.add_argument("--output", type=new_path, required=True, help="the new file; an input is never changed")
        command.add_argument("--force", action="store_true", help="replace the output if it exists")

    given = parser.parse_args(argv)
    if given.command == "resize" and given.rank is None and given.energy is None:
        parser.error("resize needs --rank, --energy or both")
    if given.command != "show":
        given.weights = getattr(given, "weights", None) or [1.0] * len(given.files)
        if len(given.weights) != len(given.files):
            parser.error(f"--weights has {len(given.weights)} numbers for {len(given.files)} LoRA files")
    return given


def new_path(text: str) -> Path:
    return _checked(text, Path, lambda path: not re.search(r"[\x00-\x1f\x7f]", str(path)), "a path without control characters")


def whole_number(text: str) -> int:
    return _checked(text, int, lambda value: value >= 1, "a whole number of at least 1")


def share(text: str) -> float:
    return _checked(text, float, lambda value: 0 < value <= 1, "a number above 0 and at most 1, such as 0.95")


def number(text: str) -> float:
    expected = "a number, such as 0.8 or -0.3, after the files"
    return _checked(text, float, lambda value: math.isfinite(value) and abs(value) <= MOST_WEIGHT, expected)


def _checked(text: str, convert: Callable[[str], Any], is_valid: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = convert(text)
    except ValueError:
        value = math.nan
    if not is_valid(value):
        raise argparse.ArgumentTypeError(f"{text!r} must be {expected}")
    return value


if __name__ == "__main__":
    sys.exit(run_main(TOOL, lambda: main(sys.argv[1:])))
