"""The evaluation that lies beside a checkpoint, for those who show it and compute nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tensorsurgeon.checkpoint.small_files import MAX_CONFIG_BYTES, parse_json, read_small
from tensorsurgeon.errors import CheckpointError

FILE_NAME: Final = "evaluation.json"


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """What lies beside a checkpoint; None if nothing does, CheckpointError if it is damaged."""
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        data = parse_json(read_small(path, MAX_CONFIG_BYTES)[0])
        float(data["target"]["perplexity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"is no evaluation as surgeon writes it ({error!r}); evaluate again", where=str(path)) from error
    return dict(data)
