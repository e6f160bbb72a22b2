"""Collect images from ComfyUI: submit the workflow, download its images, store them verified in dataset/images/.

A run that was killed continues where it stopped; a run after everything is collected submits nothing.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from dataclasses import dataclass

from collecting.config import CollectSettings
from collecting.http import parse_addresses
from collecting.image_store import ImageStore
from collecting.jobs import Job, Plan
from collecting.journal import Journal
from collecting.monitor import Display, describe_plan
from collecting.pool import ServerPool
from collecting.preflight import check, load_plan
from common.dataset_layout import DatasetFolder
from common.errors import ComfyUIError, SomeItemsFailed, run_main, stop_on_signals
from common.files import locked
from common.project import ProjectSettings
from common.settings import read_request

STAGE = "collect_images"
DISPLAY_INTERVAL_S = 0.25


@dataclass(frozen=True)
class Tables:
    """What this stage reads of the settings."""

    project: ProjectSettings
    collect: CollectSettings


def main() -> None:
    stop_on_signals()
    request = read_request(STAGE, "Collect images from ComfyUI.", sys.argv[1:], Tables)
    settings, folder = request.settings.collect, DatasetFolder(request.settings.project.dataset_dir)
    if request.check:
        check(settings, folder)
        print("Collecting: all checks passed.")
        return
    print(request.overridden(), flush=True)
    plan = load_plan(settings, folder)
    folder.images.mkdir(parents=True, exist_ok=True)
    with locked(folder.root, f"another run is collecting into {folder.root}: wait until it has finished"):
        journal, store = Journal(folder.collect_log), ImageStore(folder)
        jobs = plan.current_jobs(journal.done)
        todo = [job for job in jobs if job.key not in journal.done]
        prompts = settings.prompts_file
        names_prompts = not plan.workflow.per_batch and ("prompts_file" in request.overrides or prompts.exists())
        print(describe_plan(plan, len(jobs), len(todo), store.count_missing(), prompts if names_prompts else None))
        failed = run_jobs(todo, plan, journal, store, settings) if todo else 0
    if failed and not {job.key for job in jobs} & {key for key, _node, _index in journal.images}:
        raise ComfyUIError("ComfyUI returned no images; the reasons are listed above")
    if failed:
        raise SomeItemsFailed(f"{failed} of {len(todo)} submissions failed (see above); run the same command again to retry them")


def run_jobs(jobs: list[Job], plan: Plan, journal: Journal, store: ImageStore, settings: CollectSettings) -> int:
    """Run all jobs and show their progress. Returns how many failed."""
    addresses = parse_addresses(settings.comfyui_endpoint, settings.comfyui_headers, settings.comfyui_ca_bundle)
    options = {
        "delay_s": settings.comfyui_delay,
        "stall_timeout_s": settings.comfyui_stall_timeout,
        "api_key": settings.comfyui_api_key,
    }
    failed = 0
    with Display(plan, len(jobs)) as display, ServerPool(addresses, plan, journal, store, display.log, **options) as pool:
        pool.start(jobs)
        for result in pool.results(len(jobs), DISPLAY_INTERVAL_S):
            if result is not None:
                display.report(result)
                failed += bool(result.failures)
            display.update([worker.monitor for worker in pool.workers])
        if settings.comfyui_free:
            pool.free_memory()
    return failed


if __name__ == "__main__":
    sys.exit(run_main(STAGE, main))
