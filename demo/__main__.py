"""`python -m demo`: the whole pipeline on the demo environment, in a workspace of its own. No GPU, no Docker, no models."""

import argparse
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

REPOSITORY = Path(__file__).resolve().parent.parent
WORKSPACE = REPOSITORY / "demo" / "workspace"
MARK = ".made-by-loracat-demo"
"""Stands in every workspace: a folder without it is somebody else's and is never wiped."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--workspace", type=Path, default=WORKSPACE, help="folder that is wiped and filled anew")
    workspace = emptied(parser.parse_args().workspace)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the preparations at once

    from demo.environment import DemoEnvironment  # diffusers takes seconds to import

    world = DemoEnvironment.build(workspace)
    print(f"a demo environment is in {world.folder}. What follows is scripts/run.sh on it.\n", flush=True)
    with world.serve() as comfyui:
        code = run_pipeline(world.environment(comfyui.url, PYTHON=sys.executable))
    if code == 0:
        print(f"\n{described(world.lora)}")
    return code


def emptied(workspace: Path) -> Path:
    """`workspace`, empty but for the mark."""
    if workspace.exists():
        if any(workspace.iterdir()) and not (workspace / MARK).exists():
            sys.exit(f"{workspace}: holds something that is not a demo's; name another folder with --workspace")
        shutil.rmtree(workspace)
    workspace.mkdir(parents=True)
    (workspace / MARK).touch()
    return workspace


def run_pipeline(environment: dict[str, str]) -> int:
    """run.sh's exit code. Ctrl-C reaches run.sh from the terminal and SIGTERM is passed on: it ends, then we do."""
    signal.signal(signal.SIGINT, lambda *_: None)
    pipeline = subprocess.Popen([REPOSITORY / "scripts" / "run.sh"], env=environment)
    signal.signal(signal.SIGTERM, lambda *_: pipeline.terminate())
    return pipeline.wait()


def described(lora: Path) -> str:
    """Where the LoRA is and what its header says about it."""
    with safe_open(lora, framework="numpy") as file:
        about, modules = file.metadata(), sum(key.endswith(".alpha") for key in file.keys())  # noqa: SIM118 (not a dict)
    return "\n".join(
        [
            f"The LoRA is {lora}",
            f"  {modules} modules of rank {about['ss_network_dim']}, alpha {about['ss_network_alpha']}, "
            f"{lora.stat().st_size / 2**20:.1f} MiB, network module {about['ss_network_module']}",
            f"  trained on {about['ss_num_train_images']} images for {about['ss_num_epochs']} epochs, "
            f"{about['ss_steps']} steps, on {about['ss_sd_model_name']}",
            f"  trigger word {about['modelspec.trigger_phrase']}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
