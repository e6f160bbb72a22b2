"""`python -m benchmarks.limits`: what becomes of a run on cards of 6 to 24 GB, tried on a larger card. Needs CUDA.

Another process holds the rest of the card's memory: the run finds as much free as on the small card. It trains, saves and renders
samples, or is refused. The prediction is what the run (and `--check`) says before it loads anything, samples included; the peak is
what nvidia-smi sees.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.train import Job, attempt, build, machine, peak_of_gpu_memory, require_gpu
from common.errors import run_main

LIMITS_GB = (6, 8, 10, 12, 16, 24)
SMALL_CARD = {"gradient_checkpointing": "", "preset": "8gb"}
SETTINGS = {
    "defaults": {"gradient_checkpointing": "auto"},
    "PRESET=8gb": SMALL_CARD,
    "PRESET=8gb OPTIMIZER=adamw8bit LORA_RANK=8": SMALL_CARD | {"optimizer": "adamw8bit", "lora_rank": 8},
}
"""By their names; empty means as in the preset."""
_HOLD = """
import sys, torch
torch.empty(1, device="cuda")
held = torch.empty(max(0, torch.cuda.mem_get_info()[0] - int(sys.argv[1])), dtype=torch.uint8, device="cuda")
print(torch.cuda.mem_get_info()[0], flush=True)
sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/loracat-benchmark"), help="working folder (15 GB)")
    parser.add_argument("--gb", type=float, nargs="*", default=LIMITS_GB, help="sizes of cards in 10^9 bytes")
    parser.add_argument("--only", default="", help="regular expression: only settings with such names")
    options = parser.parse_args()
    require_gpu()
    build(options.folder)
    print(machine(), "", "| card, GB | settings | exit code | predicted, GiB | peak, GiB | samples | last line |", sep="\n")
    print("|---|---|---|---|---|---|---|", flush=True)
    for limit in options.gb:
        for name, settings in SETTINGS.items():
            if re.search(options.only, name):
                with card_of(limit):
                    print(tried(options.folder, limit, name, settings), flush=True)


def tried(folder: Path, limit: float, name: str, settings: dict[str, object]) -> str:
    """One row of the table."""
    job = Job(f"{limit:g} GB, {name}", "one", 2, {"samples": "true", "sample_steps": 4} | settings)
    with peak_of_gpu_memory() as peak:
        code, _, log = attempt(folder, job)
    predicted = re.findall(r"memory: about ([\d.]+)|and ([\d.]+) GiB (?:of memory besides|more)", log)
    gib = sum(float(number) for numbers in predicted for number in numbers if number)
    samples = len(list((folder / "output" / "samples").rglob("*.png")))
    last = log.splitlines()[-1].partition("s  ")[2]
    return f"| {limit:g} | {name} | {code} | {f'{gib:.1f}' if gib else ''} | {peak[0] / 1024:.2f} | {samples} | {last} |"


@contextmanager
def card_of(limit_gb: float) -> Iterator[None]:
    """Within this block, so much of the GPU's memory is free."""
    command = [sys.executable, "-c", _HOLD, str(int(limit_gb * 1e9))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        print(f"free: {int(holder.stdout.readline()) / 1e9:.2f} GB", file=sys.stderr, flush=True)
        yield
        holder.stdin.close()


if __name__ == "__main__":
    sys.exit(run_main("benchmarks.limits", main))
