"""The evaluation that lies beside a checkpoint, for those who show it and compute nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tensorsurgeon.checkpoint.forms import require_form
from tensorsurgeon.checkpoint.small_files import MAX_CONFIG_BYTES, parse_json, read_small
from tensorsurgeon.checkpoint.telling import EVALUATION
from tensorsurgeon.errors import CheckpointError

FILE_NAME: Final = EVALUATION
_QUANTILES: Final = {"p50": float, "p95": float, "p99": float, "max": float}
_MODEL: Final = {"name": str, "perplexity": float, "nll": float, "nll_se": float}
_COMPARED: Final = {
    "kl": float, "kl_se": float, "kl_quantiles": _QUANTILES, "reverse_kl": float, "reverse_kl_se": float,
    "reverse_kl_quantiles": _QUANTILES, "top1_agreement": float, "hidden_error": [float, 1],
}  # fmt: skip
_FORM: Final = {
    "text": {"tokens": int, "sequences": int, "sources": [{"name": str}]},
    "source": (None, _MODEL),
    "target": {**_MODEL, "inputs": str},
}


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """What lies beside a checkpoint; None if nothing does, CheckpointError if it is damaged."""
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        data = parse_json(read_small(path, MAX_CONFIG_BYTES)[0])
        require_form(data, _FORM)
        if "kl" in data["target"]:
            require_form(data["target"], _COMPARED)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"is no evaluation as surgeon writes it ({error}); evaluate again", where=str(path)) from error
    return dict(data)
