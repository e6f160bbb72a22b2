"""Whether, and from which checkpoint, a run is continued, given what changed since it was saved."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import SettingsError, bullet_list
from common.settings import pipeline_command
from training.config import RunSettings
from training.plan import GLOBAL_BATCH, WARMUP_STEPS, WORLD_SIZE, changes
from training.state.checkpoint import Checkpoint, Identity, newest

EPOCHS, EARLY_STOP = "num_train_epochs", "early_stop_patience"


def warmup_to_keep(saved: Checkpoint, fingerprint: Mapping[str, Any]) -> int:
    """The warm-up steps of a run that may be extended: those it began with, whatever its number of epochs is now."""
    before = saved.identity.fingerprint
    same = all(before.get(key) == fingerprint[key] for key in ("lr_scheduler", "lr_warmup"))
    return before[WARMUP_STEPS] if same and before["lr_scheduler"] == "constant" else fingerprint[WARMUP_STEPS]


def find_resume_point(folder: Path, saved: Checkpoint, now: Identity) -> Checkpoint:
    """The checkpoint in `folder` from which the run `now` is continued: `saved`, or an older one that is part of both runs.

    Raises SettingsError if `saved` belongs to another run than `now`.
    """
    before = saved.identity
    found = changes(before.fingerprint, now.fingerprint)
    allowed = {EPOCHS, EARLY_STOP} if now.fingerprint["lr_scheduler"] == "constant" else {EARLY_STOP}
    point = saved
    if EPOCHS in found:  # the steps of the two runs differ from where the shorter one ends
        point = newest(folder, at_most=min(before.shared_prefix_steps, now.shared_prefix_steps))
    if not found.keys() <= allowed or point is None:
        title = f"{folder} holds a run, stopped at step {saved.progress.next_step}, with other settings or data:"
        remedy = f"Restore these values to continue that run, or archive it and start again: {pipeline_command('--train', FRESH=1)}"
        raise SettingsError(f"{bullet_list(title, list(found.values()))}\n{remedy}")
    for change in (found | changes(before.runtime, now.runtime)).values():
        print(f"setting changed since the checkpoint: {change}", flush=True)
    return point


def match_global_batch(run: RunSettings, world_size: int, saved: Checkpoint | None) -> RunSettings:
    """`run` with the gradient accumulation by which `world_size` processes take steps of the size that the saved run has, if
    their number has changed since. Raises SettingsError if that does not divide, with what would."""
    if saved is None or world_size == saved.identity.runtime[WORLD_SIZE]:
        return run
    samples = saved.identity.fingerprint[GLOBAL_BATCH]
    accumulation, rest = divmod(samples, run.train_batch_size * world_size)
    if rest == 0 and accumulation:
        return replace(run, gradient_accumulation_steps=accumulation)
    fitting = [str(batch) for batch in range(1, samples + 1) if samples % (batch * world_size) == 0]
    remedy = f"set TRAIN_BATCH_SIZE to {' or '.join(fitting)}" if fitting else "set NUM_PROCESSES to a divisor of it"
    raise SettingsError(
        f"the saved run has {samples} images per step, which {world_size} processes with batch size {run.train_batch_size} cannot "
        f"share: {remedy}, or set FRESH=1 to archive it and start again"
    )
