"""How a checkpoint was made, kept beside it for card and page: what the plan knew and no file of the output says.

``surgeon_plan.json`` names no folder of this machine and no time, so that the same run leaves the same file.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from tensorsurgeon.checkpoint.folder import Checkpoint
from tensorsurgeon.checkpoint.forms import require_form
from tensorsurgeon.checkpoint.quantization import quantization_config
from tensorsurgeon.checkpoint.small_files import MAX_CONFIG_BYTES, parse_json, read_small
from tensorsurgeon.checkpoint.telling import MADE
from tensorsurgeon.engines.advice import EngineAdvice, advice_as_data
from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.formats.coding import stored_in, written_by
from tensorsurgeon.formats.registry import name_of
from tensorsurgeon.models.describe import describe_model
from tensorsurgeon.models.fused import describe
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.planning.report import plan_as_data
from tensorsurgeon.tensors.dtypes import WEIGHT_DTYPES
from tensorsurgeon.tensors.spec import SpecMap
from tensorsurgeon.version import __version__

FILE_NAME: Final = MADE
_COUNTS: Final = {str: int}
_ADVICE: Final = {"engine": str, "severity": str, "tp": int, "subject": str, "reason": str, "source": str}
_FORM: Final = {
    "command": [str],
    "source": {"name": str, "bytes": int, "parts": _COUNTS, "parameters": (int, None)},
    "output": {"bytes": int, "parts": _COUNTS, "quantized_bytes": int, "quantized_parameters": (int, None)},
    "linears": int,
    "quantized": _COUNTS,
    "schemes": [{"format": str, "scheme": str, "method": str, "num_bits": int, "linears": int}],
    "unquantized": _COUNTS,
    "why_unquantized": {str: str},
    "dropped": _COUNTS,
    "steps": [{"op": str, "read": int, "made": int, "recipe": str}],
    "engines": [{"engine": str, "version": str, "asked_tp": [int], "loads_at_tp": [int], "advice": [_ADVICE]}],
}


def made_of(plan: Plan, command: Sequence[str], advice: Sequence[EngineAdvice]) -> dict[str, Any]:
    """What is worth keeping of a plan; ``command`` as a person would type it elsewhere."""
    said = plan_as_data(plan)
    return {
        "tensorsurgeon": __version__,
        "command": list(command),
        "source": {
            "name": name_of_model(plan.source),
            "bytes": plan.source.weight_bytes,
            "parts": bytes_by_part(plan.source.specs),
            "parameters": _parameters(plan.source.specs),
        },
        "output": {
            "bytes": plan.output_bytes,
            "parts": bytes_by_part(plan.specs),
            "quantized_bytes": sum(spec.nbytes for spec in plan.specs.values() if spec.module in plan.quantized),
            "quantized_parameters": _quantized_parameters(plan),
        },
        "linears": said["linears"],
        "quantized": said["quantized"],
        "schemes": _schemes(plan),
        "unquantized": said["unquantized"],
        "why_unquantized": said["why_unquantized"],
        "dropped": said["dropped"],
        "steps": [{key: step[key] for key in ("op", "read", "made", "recipe")} for step in said["steps"]],
        "engines": advice_as_data(advice),
    }


def made_bytes(made: dict[str, Any]) -> bytes:
    """The file's content."""
    return json.dumps(made, indent=1).encode() + b"\n"


def read_made(folder: Path) -> dict[str, Any] | None:
    """What lies beside a checkpoint; None if nothing does, CheckpointError if it is damaged."""
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        made = parse_json(read_small(path, MAX_CONFIG_BYTES)[0])
        require_form(made, _FORM)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"is not what surgeon wrote ({error}); remove it, or convert again", where=str(path)) from error
    return dict(made)


def name_of_model(checkpoint: Checkpoint) -> str:
    """``owner/name`` for a model of the Hub, in its cache too, else what the folder is called."""
    if checkpoint.snapshot is not None:
        return checkpoint.snapshot.repository
    root = checkpoint.root.resolve()
    if len(root.parts) > 3 and root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        return root.parent.parent.name.removeprefix("models--").replace("--", "/")
    return root.name


def bytes_by_part(specs: SpecMap) -> dict[str, int]:
    """How large each part of a model is, by what its tensors are for, the largest first."""
    model = describe_model(specs)
    sizes: dict[str, int] = defaultdict(int)
    for name, spec in specs.items():
        sizes[str(model.use(name).role or "other")] += spec.nbytes
    return dict(sorted(sizes.items(), key=lambda part: -part[1]))


def _parameters(specs: SpecMap) -> int | None:
    """Weights of a model in floats; None where its config says that codes hide them."""
    if quantization_config(specs.config) is not None:
        return None
    return sum(spec.numel for spec in specs.values() if spec.dtype in WEIGHT_DTYPES)


def _quantized_parameters(plan: Plan) -> int | None:
    """Weights that are codes in the output; None where the source had codes of them already."""
    total = 0
    for rewrite in (rewrite for rewrites in plan.rewrites for rewrite in rewrites if written_by(rewrite.detail) is not None):
        if stored_in(rewrite.detail) is not None:
            return None
        total += sum(region.shape[0] * region.shape[1] for region in rewrite.inputs if len(region.shape) == 2)
    return total or None


def _schemes(plan: Plan) -> list[dict[str, Any]]:
    """Layout, scheme and method of the quantized linears, with how many are so."""
    counts: Counter[tuple[str, str, str, int]] = Counter()
    modules = Counter(map(id, plan.written.values()))
    for written in plan.ways:
        layout = name_of(written.format)
        counts[layout, describe(written.scheme), written.method, written.scheme.num_bits] += modules[id(written)]
    return [
        {"format": layout, "scheme": scheme, "method": method, "num_bits": bits, "linears": count}
        for (layout, scheme, method, bits), count in counts.items()
    ]


def methods_of(made: dict[str, Any]) -> Iterable[str]:
    """How codes were chosen, each method once."""
    return dict.fromkeys(str(scheme["method"]) for scheme in made["schemes"])
