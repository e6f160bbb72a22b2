"""Collect images from ComfyUI: the workflow goes out, its images come back verified into dataset/images/.

Killed at any instant and run again it goes on where it was; run again when all is done it submits nothing.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while libraries are imported ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys

from collecting.config import CollectSettings
from collecting.graph import literal_seeds
from collecting.http import addresses
from collecting.image_store import ImageStore
from collecting.jobs import Job, Plan, read_plan
from collecting.journal import Progress
from collecting.monitor import Display
from collecting.pool import Fleet
from collecting.preflight import check, check_folder
from common.dataset_layout import DatasetFolder
from common.errors import ComfyUIError, SettingsError, SomeItemsFailed, bullet_list, run_main, stop_on_signals
from common.files import locked
from common.project import ProjectSettings
from common.settings import read_request

STAGE = "collect_images"
TICK_S = 0.25
"""How often the display is refreshed while nothing ends."""


def main() -> None:
    """The whole stage, in order."""
    stop_on_signals()
    request = read_request(
        STAGE, "Collect images from ComfyUI.", sys.argv[1:], {"project": ProjectSettings, "collect": CollectSettings}
    )
    settings, folder = request.sections["collect"], DatasetFolder(request.sections["project"].dataset_dir)
    if request.check:
        check(settings, folder)
        print("Collecting: everything that is needed is there.")
        return
    plan = _plan(settings, folder)
    folder.images.mkdir(parents=True, exist_ok=True)
    with locked(folder.root, f"another run is collecting into {folder.root}: wait for it to end"):
        _fill(folder, plan, settings)


def _fill(folder: DatasetFolder, plan: Plan, settings: CollectSettings) -> None:
    """Collect what is still missing of `plan`."""
    progress = Progress(folder.collect_log)
    store = ImageStore(folder)
    jobs = _jobs(plan, progress)
    _introduce(plan, jobs)
    todo = [job for job in jobs if not progress.is_done(job.key)]
    if todo:
        failed = _collect(settings, plan, progress, store, todo)
        _judge(failed, len(todo), progress.has_images([job.key for job in jobs]))
    else:
        print(_nothing_to_do(plan, store))


def _plan(settings: CollectSettings, folder: DatasetFolder) -> Plan:
    problems: list[str] = []
    plan = read_plan(settings, problems)
    check_folder(folder, problems)
    if plan is None or problems:
        raise SettingsError(bullet_list("nothing was sent to ComfyUI, because:", problems))
    return plan


def _jobs(plan: Plan, progress: Progress) -> list[Job]:
    """The work of this run; with NEW_SEEDS the round that is not finished, or a new one."""
    if not plan.new_seeds:
        return plan.jobs(0)
    return plan.jobs(progress.first_open_round(lambda number: [job.key for job in plan.jobs(number)]))


def _introduce(plan: Plan, jobs: list[Job]) -> None:
    mode = f"Per-batch mode, prompts: {len(jobs)}" if plan.workflow.per_batch else "Full-workflow mode, one submission"
    nodes = ", ".join(plan.workflow.kept_nodes[:12]) + (" ..." if len(plan.workflow.kept_nodes) > 12 else "")
    print(f"{mode}; images are kept of {len(plan.workflow.kept_nodes)} of the workflow's nodes: {nodes}.")
    if plan.face is not None:
        print(f"The face reference goes into node {plan.workflow.face_input}.")
    elif plan.workflow.face_input is None:
        print("No face goes in: workflow_config.json names no image_loader_node.")
    else:
        print("No face reference (FACE_REFERENCE or face_reference.png): the workflow's own image stays.")


def _collect(settings: CollectSettings, plan: Plan, progress: Progress, store: ImageStore, todo: list[Job]) -> int:
    """Do all the work; returns how much of it failed."""
    servers = addresses(settings.comfyui_endpoint, settings.comfyui_headers, settings.comfyui_ca_bundle)
    timing_s = settings.comfyui_delay, settings.comfyui_stall_timeout
    failed = 0
    with Display(plan, len(todo)) as display, Fleet(servers, plan, progress, store, display.say, *timing_s) as fleet:
        fleet.start(todo)
        for finished in fleet.finished(len(todo), TICK_S):
            if finished is not None:
                display.tell(finished.job.label, finished.outcome)
                failed += bool(finished.outcome.failures)
            display.show(fleet.lives)
        if settings.comfyui_free:
            fleet.free()
    return failed


def _judge(failed: int, submitted: int, something_came: bool) -> None:
    """Raise what the exit code is made of."""
    if failed and not something_came:
        raise ComfyUIError("ComfyUI gave no image; the reasons are above")
    if failed:
        raise SomeItemsFailed(f"{failed} of {submitted} submissions failed, as named above; run it again to try only these")


def _nothing_to_do(plan: Plan, store: ImageStore) -> str:
    missing = store.missing()
    gone = f" Of the images {missing} were taken out of the folder since and stay out." if missing else ""
    more = " NEW_SEEDS=1 makes another set." if literal_seeds(plan.workflow.graph) else ""
    return f"All of this was collected before, so nothing was sent.{gone}{more}"


if __name__ == "__main__":
    sys.exit(run_main(STAGE, main))
