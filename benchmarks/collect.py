"""`python -m benchmarks.collect [--url http://127.0.0.1:8188]`: how busy the collector keeps a ComfyUI.

Without `--url` a stand-in is started. Prompts of the requested length are built from nodes that need no model (a chain of
ImageBlur, or one node of a class that waits, `--sleep-node`), and are new to the server each time. All times are the
server's own, from its history: "busy" is the time in which it executed prompts, as a share of the time from the first start
to the last end; a gap is the time from one end to the next start. Two other ways are measured: a simple client that
submits one prompt after the other and polls every 2 s; and all prompts queued at once, the upper limit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import requests

from common.settings import REPOSITORY
from demo.environment import setting_names
from demo.standin_comfyui.server import StandIn

POLL_S = 2.0
BLURS_TO_TRY = 8
ONE_BY_ONE_PROMPTS = 10
QUEUED_PROMPTS = 20
Chain = list[tuple[str, dict[str, object]]]
"""The nodes that process an image: class and inputs."""
CASES = ((100, 0.5), (30, 3.0))
"""Number of prompts, and seconds that each takes."""


@dataclass(frozen=True)
class Times:
    """When prompts ran, in seconds by the server's clock: [(start, end)], in order."""

    spans: list[tuple[float, float]]

    def row(self, way: str) -> str:
        run_s = sum(end - start for start, end in self.spans) / len(self.spans)
        gaps_s = [later[0] - earlier[1] for earlier, later in zip(self.spans, self.spans[1:], strict=False)]
        whole_s = self.spans[-1][1] - self.spans[0][0]
        busy = 100 * sum(end - start for start, end in self.spans) / whole_s
        gaps_ms = [1000 * statistic(gaps_s) for statistic in (median, mean, max)]
        return f"| {way} | {len(self.spans)} | {run_s:.2f} | " + " | ".join(f"{gap:.0f}" for gap in gaps_ms) + f" | {busy:.1f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="URL of a ComfyUI server; default: a stand-in is started")
    parser.add_argument("--prompts", type=int, help="number of prompts, instead of the two default cases")
    parser.add_argument("--seconds", type=float, default=0.5, help="duration of each of --prompts")
    parser.add_argument(
        "--sleep-node",
        metavar="CLASS",
        help="instead of ImageBlur, a class with inputs image and seconds",
    )
    flags = parser.parse_args()
    cases = ((flags.prompts, flags.seconds),) if flags.prompts else CASES
    print("| way | prompts | seconds each | median gap, ms | mean | longest | busy |\n|---|---|---|---|---|---|---|")
    for prompts, seconds in cases:
        with tempfile.TemporaryDirectory() as folder:
            if flags.url:
                chain = [(flags.sleep_node, {"seconds": seconds})] if flags.sleep_node else blurs_for(flags.url, seconds)
                measure(flags.url, Path(folder), prompts, chain)
            else:
                with StandIn(Path(folder) / "server", seconds_per_job=seconds) as standin:
                    measure(standin.url, Path(folder), prompts, [])


def measure(url: str, folder: Path, prompts: int, chain: Chain) -> None:
    """Print one row for each way."""
    print(times_of(url, collect(url, folder, prompts, chain)).row("the collector"), flush=True)
    print(times_of(url, one_by_one(url, min(prompts, ONE_BY_ONE_PROMPTS), chain)).row("one by one, poll every 2 s"), flush=True)
    print(times_of(url, all_at_once(url, min(prompts, QUEUED_PROMPTS), chain)).row("all queued at once"), flush=True)


def workflow(chain: Chain, seed: int = 0, text: str = "") -> dict[str, dict]:
    """The collector sets seed and text. EmptyImage ignores them, but the server runs it again when they change."""
    graph = {"1": _node("EmptyImage", width=512, height=512, batch_size=1, color=8, seed=seed, text=text)}
    for number, (class_type, inputs) in enumerate(chain, start=2):
        graph[str(number)] = _node(class_type, image=[str(number - 1), 0], **inputs)
    return graph | {"save": _node("SaveImage", images=[str(1 + len(chain)), 0], filename_prefix="loracat_benchmark/image")}


def _node(class_type: str, **inputs: object) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def blurs_for(url: str, seconds: float) -> Chain:
    """As many blurs as take `seconds` on this server; the first prompt only warms it up."""
    blur = ("ImageBlur", {"blur_radius": 20, "sigma": 5.0})
    for _ in range(2):
        start, end = times_of(url, one_by_one(url, 1, [blur] * BLURS_TO_TRY)).spans[0]
    return [blur] * max(1, round(BLURS_TO_TRY * seconds / (end - start)))


def collect(url: str, folder: Path, prompts: int, chain: Chain) -> list[str]:
    """Run the real collector with its default settings; returns the prompt ids."""
    fresh = uuid.uuid4().hex
    files = {
        "COMFYUI_WORKFLOW": workflow(chain),
        "WORKFLOW_CONFIG": {"positive_prompt_node": "1", "seed_node": "1", "output_node": "save"},
        "PROMPTS_FILE": [{"prompt": f"{fresh} {number}", "seed": number} for number in range(prompts)],
    }
    variables = {name: value for name, value in os.environ.items() if name not in setting_names()}
    variables |= {"COMFYUI_ENDPOINT": url, "DATASET_DIR": str(folder / "dataset"), "COMFYUI_FREE": "0"}
    for name, content in files.items():
        path = folder / f"{name.lower()}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        variables[name] = str(path)
    command = [sys.executable, str(REPOSITORY / "scripts" / "collect_images.py")]
    subprocess.run(command, env=variables, stdout=subprocess.DEVNULL, check=True)
    record = (folder / "dataset" / ".loracat" / "collect.jsonl").read_text(encoding="utf-8")
    events = [json.loads(line) for line in record.splitlines()]
    return [event["prompt_id"] for event in events if event["event"] == "sent"]


def one_by_one(url: str, prompts: int, chain: Chain) -> list[str]:
    """Submit the next prompt when the previous one is in the history."""
    ids = []
    for number in range(prompts):
        ids.append(queued(url, number, chain))
        wait_for(url, ids[-1])
    return ids


def all_at_once(url: str, prompts: int, chain: Chain) -> list[str]:
    ids = [queued(url, number, chain) for number in range(prompts)]
    for prompt_id in ids:
        wait_for(url, prompt_id)
    return ids


def queued(url: str, number: int, chain: Chain) -> str:
    body = {"prompt": workflow(chain, number, uuid.uuid4().hex), "client_id": "benchmark"}
    return requests.post(f"{url}/prompt", json=body, timeout=60).json()["prompt_id"]


def wait_for(url: str, prompt_id: str) -> None:
    while prompt_id not in requests.get(f"{url}/history/{prompt_id}", timeout=60).json():
        time.sleep(POLL_S)


def times_of(url: str, ids: list[str]) -> Times:
    spans = []
    for prompt_id in ids:
        entry = requests.get(f"{url}/history/{prompt_id}", timeout=60).json()[prompt_id]
        times = [data["timestamp"] / 1000 for _, data in entry["status"]["messages"]]
        spans.append((times[0], times[-1]))
    return Times(sorted(spans))


if __name__ == "__main__":
    main()
