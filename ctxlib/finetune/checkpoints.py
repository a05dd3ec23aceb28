"""Checkpoints of a training: the newest complete one, and the damage of the others."""

import shutil
import warnings
import zipfile
from pathlib import Path

from ctxlib.files import read_json_object
from ctxlib.models import check_weights
from ctxlib.params import InputError


def last_checkpoint(work_dir: Path, tidy: bool) -> str | None:
    """The newest complete checkpoint; if `tidy`, newer damaged ones are removed.

    A warning reports removed checkpoints, except an unfinished one if there is another to resume from.
    """
    whole, damaged = None, {}
    for folder in sorted(work_dir.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        if not (damage := _damage(folder)):
            whole = folder
            break
        damaged[folder] = damage
    if not tidy:
        return whole and str(whole)
    for folder in damaged:
        shutil.rmtree(folder)
    if reported := [damage for damage in damaged.values() if whole is None or not damage.endswith(_UNFINISHED)]:
        then = f"resumes from {whole.name}" if whole else "starts over, there is no other"
        warnings.warn(f"{'; '.join(reported)}: training {then}", stacklevel=3)
    return whole and str(whole)


_UNFINISHED = "not written to its end"


def _damage(checkpoint: Path) -> str | None:
    """The first damage found in a checkpoint, of which trainer_state.json is written last."""
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return f"{checkpoint}: {_UNFINISHED}"
    try:
        read_json_object(state)
        check_weights(checkpoint)
    except InputError as damage:
        return str(damage)
    random_states = sorted(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]
    saved = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *random_states]
    broken = [file for file in saved if not zipfile.is_zipfile(file)]
    return f"{broken[0]}: missing or cut short" if broken else None
