"""What changed between stop and resume decides whether, and from where, a run continues."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import SettingsError, bullet_list
from training.config import RunSettings
from training.plan import GLOBAL_BATCH, WARMUP_STEPS
from training.state import checkpoint
from training.state.checkpoint import Identity, Saved

EPOCHS, EARLY_STOP = "num_train_epochs", "early_stop_patience"


def warmup_to_keep(saved: Saved, fingerprint: Mapping[str, Any]) -> int:
    """The warm-up of a run that may be lengthened: the one it began with, whatever the number of its epochs is now."""
    before = saved.identity.fingerprint
    same = all(before.get(key) == fingerprint[key] for key in ("lr_scheduler", "lr_warmup"))
    return before[WARMUP_STEPS] if same and before["lr_scheduler"] == "constant" else fingerprint[WARMUP_STEPS]


def find_resume_point(folder: Path, saved: Saved, now: Identity) -> Saved:
    """The state in `folder` from which the run `now` goes on: `saved`, or an older one that both lengths of the run share.

    Raises SettingsError if the run that `saved` belongs to is another one than `now`.
    """
    before = saved.identity
    changes = _changes(before.fingerprint, now.fingerprint)
    taken = {EPOCHS, EARLY_STOP} if now.fingerprint["lr_scheduler"] == "constant" else {EARLY_STOP}
    shared = saved
    if EPOCHS in changes:  # their steps differ from where the shorter one of the two ends
        shared = checkpoint.newest(folder, at_most=min(before.common_steps, now.common_steps))
    if not changes.keys() <= taken or shared is None:
        title = f"{folder} holds a run, stopped at step {saved.progress.next_step}, that began differently:"
        remedy = "set it back to continue that run, or set FRESH=1 to lay it aside and begin anew"
        raise SettingsError(bullet_list(title, [*changes.values(), remedy]))
    changes |= _changes(before.circumstances, now.circumstances)
    for change in changes.values():
        print(f"changed and taken: {change}", flush=True)
    return shared


def match_global_batch(run: RunSettings, processes: int, saved: Saved | None) -> RunSettings:
    """`run` with the accumulation by which `processes` take steps of the size that the saved run has, if their number has
    changed since. Raises SettingsError if that does not divide, with what would fit."""
    if saved is None or processes == saved.identity.circumstances["processes"]:
        return run
    wanted = saved.identity.fingerprint[GLOBAL_BATCH]
    accumulation, rest = divmod(wanted, run.train_batch_size * processes)
    if rest == 0 and accumulation:
        return replace(run, gradient_accumulation_steps=accumulation)
    fitting = [str(batch) for batch in range(1, wanted + 1) if wanted % (batch * processes) == 0]
    remedy = f"set TRAIN_BATCH_SIZE to {' or '.join(fitting)}" if fitting else "set NUM_PROCESSES to a divisor of it"
    raise SettingsError(
        f"the saved run has {wanted} images per step; {processes} processes with batch size {run.train_batch_size} cannot take "
        f"such steps: {remedy}, or set FRESH=1 to lay it aside and begin anew"
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What is different, by name, in words."""
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return {key: f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in keys}
