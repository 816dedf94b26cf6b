"""What ``surgeon verify --against`` found, kept beside the checkpoint for card and page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

from tensorsurgeon.checkpoint.forms import require_form
from tensorsurgeon.checkpoint.sink import publish_bytes
from tensorsurgeon.checkpoint.small_files import MAX_INDEX_BYTES, parse_json, read_small
from tensorsurgeon.checkpoint.telling import VERIFICATION
from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.running.record import add_files
from tensorsurgeon.verifying.judging import Verification, verify
from tensorsurgeon.verifying.reporting import verification_as_data

FILE_NAME: Final = VERIFICATION
_WEIGHT_KEYS: Final = ("name", "num_bits", "snr_db", "exact", "floor_db")
_WEIGHT: Final = {"name": str, "num_bits": int, "snr_db": (float, None), "exact": bool, "floor_db": float}
_FORM: Final = {
    "sound": bool,
    "faults": [{"kind": str, "where": str, "message": str}],
    "equal_bytes?": (int, None),
    "kinds": [{"pattern": str, "count": int, "min_db": (float, None), "mean_db": (float, None), "exact": int}],
    "weights": [_WEIGHT],
    "worst": [_WEIGHT],
}


def checkpoint_folder(target: str | os.PathLike[str]) -> Path:
    """The folder that card and page are about; CheckpointError for anything else, a model on the Hub included."""
    folder = Path(target)
    if not folder.is_dir():
        raise CheckpointError("is no folder of a checkpoint", where=str(folder))
    return folder


def verify_and_keep(folder: Path, against: str | os.PathLike[str], *, workers: int | None = None) -> Verification:
    """Verify a checkpoint against its original, and keep what was found beside it."""
    found = verify(folder, against, workers=workers)
    write_verification(folder, found)
    return found


def write_verification(folder: Path, found: Verification) -> Path:
    """Keep a verification against the original; folders of this machine are left out."""
    data = verification_as_data(found)
    data = {key: value for key, value in data.items() if key not in ("path", "against")}
    data["weights"] = [{key: weight[key] for key in _WEIGHT_KEYS} for weight in data["weights"]]
    content = json.dumps(data).encode() + b"\n"
    publish_bytes(folder / FILE_NAME, content)
    add_files(folder, {FILE_NAME: content})
    return folder / FILE_NAME


def read_verification(folder: Path) -> dict[str, Any] | None:
    """What lies beside a checkpoint; None if nothing does, CheckpointError if it is damaged."""
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        data = parse_json(read_small(path, MAX_INDEX_BYTES)[0])
        require_form(data, _FORM)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"is not what surgeon wrote ({error}); verify again", where=str(path)) from error
    return dict(data)
