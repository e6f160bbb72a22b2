"""`python -m demo`: run the whole pipeline on the demo environment, in a separate workspace. No GPU, no Docker, no models."""

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
"""File that marks a workspace of the demo: a folder without it is never emptied."""

SAMPLES = {"samples": True, "sample_size": 128, "sample_steps": 2, "sample_every_epochs": 2}
"""Settings of the sample images. The weights are random, so they show noise."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--workspace", type=Path, default=WORKSPACE, help="folder to empty and use (default: demo/workspace)")
    workspace = empty_workspace(parser.parse_args().workspace)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the pipeline runs, Ctrl-C ends the program immediately

    from demo.environment import DemoEnvironment  # imports diffusers, which takes seconds

    demo = DemoEnvironment.build(workspace)
    print(f"Created a demo environment in {demo.folder}. Running scripts/run.sh on it.\n", flush=True)
    with demo.serve() as comfyui:
        code = run_pipeline(demo.environment(comfyui.url, PYTHON=sys.executable, **SAMPLES))
    if code == 0:
        print(f"\n{describe_lora(demo.lora)}\n\n{next_steps(demo.output / 'report.html')}")
    return code


def empty_workspace(workspace: Path) -> Path:
    """Empty or create `workspace`, put the file MARK into it and return it. Refuses a folder that the demo did not create."""
    try:
        if workspace.exists():
            if any(workspace.iterdir()) and not (workspace / MARK).exists():
                sys.exit(f"{workspace} contains files that were not created by the demo; choose another folder with --workspace")
            shutil.rmtree(workspace)
        workspace.mkdir(parents=True)
        (workspace / MARK).touch()
    except OSError as error:
        sys.exit(f"{workspace}: {error.strerror}; choose another folder with --workspace")
    return workspace


def run_pipeline(environment: dict[str, str]) -> int:
    """Run run.sh and return its exit code. The terminal sends Ctrl-C to run.sh as well; SIGTERM is passed on to it."""
    signal.signal(signal.SIGINT, lambda *_: None)
    pipeline = subprocess.Popen([REPOSITORY / "scripts" / "run.sh"], env=environment)
    signal.signal(signal.SIGTERM, lambda *_: pipeline.terminate())
    return pipeline.wait()


def describe_lora(lora: Path) -> str:
    """The path of the LoRA file and a summary of its header."""
    with safe_open(lora, framework="numpy") as file:
        metadata, modules = file.metadata(), sum(key.endswith(".alpha") for key in file.keys())  # noqa: SIM118 (not a dict)
    return "\n".join(
        [
            f"The LoRA is {lora}",
            f"  {modules} modules of rank {metadata['ss_network_dim']}, alpha {metadata['ss_network_alpha']}, "
            f"{lora.stat().st_size / 2**20:.1f} MiB, network module {metadata['ss_network_module']}",
            f"  trained on {metadata['ss_num_train_images']} images for {metadata['ss_num_epochs']} epochs, "
            f"{metadata['ss_steps']} steps, on {metadata['ss_sd_model_name']}",
            f"  trigger word {metadata['modelspec.trigger_phrase']}",
        ]
    )


def next_steps(page: Path) -> str:
    """What to look at, and how to train a LoRA of one's own."""
    return "\n".join(
        [
            f"Open the page of this run in a browser: {page.as_uri()}",
            "  The models of the demo are tiny and random, so its sample images show noise.",
            "Next: a LoRA of your own",
            "  put an SDXL base model into models/, and a photo of the face or your own images beside it (see README.md)",
            "  docker compose run --rm loracat --check      says what is missing",
            "  docker compose run --rm loracat --review     collects, captions, and stops so that you can look at the page",
            "  docker compose run --rm loracat --train      trains",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
