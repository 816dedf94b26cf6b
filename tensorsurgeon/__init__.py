"""tensorsurgeon: checkpoint surgery, streamed from shard to shard.

Everything public is listed here; each name is imported when it is first used, so that ``import tensorsurgeon`` costs
nothing and planning never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tensorsurgeon.version import __version__

if TYPE_CHECKING:
    from tensorsurgeon.api import apply, card, describe, diff, evaluate, inspect, page, plan, push, transform, verify
    from tensorsurgeon.calibrate.options import CalibrationOptions, DataSource
    from tensorsurgeon.checkpoint.folder import Checkpoint, open_checkpoint
    from tensorsurgeon.errors import SurgeonError
    from tensorsurgeon.evaluating.result import Evaluation
    from tensorsurgeon.ops.cast import Cast
    from tensorsurgeon.ops.concat import Concat
    from tensorsurgeon.ops.dequantize import Dequantize
    from tensorsurgeon.ops.drop import Drop
    from tensorsurgeon.ops.expect import Expect
    from tensorsurgeon.ops.keep import Keep
    from tensorsurgeon.ops.quantize import Quantize
    from tensorsurgeon.ops.rename import Rename
    from tensorsurgeon.ops.repack import Repack
    from tensorsurgeon.ops.reshape import Reshape
    from tensorsurgeon.ops.split import Split
    from tensorsurgeon.ops.split_experts import SplitExperts
    from tensorsurgeon.ops.squeeze import Squeeze
    from tensorsurgeon.ops.stack import Stack
    from tensorsurgeon.ops.stack_experts import StackExperts
    from tensorsurgeon.ops.transpose import Transpose
    from tensorsurgeon.ops.unsqueeze import Unsqueeze
    from tensorsurgeon.ops.unstack import Unstack
    from tensorsurgeon.planning.plan import Plan
    from tensorsurgeon.planning.rewriting import Chain, Rewrite, Transform
    from tensorsurgeon.running.run import RunResult
    from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec

_HOMES = {
    "tensorsurgeon.api": (
        "apply",
        "card",
        "describe",
        "diff",
        "evaluate",
        "inspect",
        "page",
        "plan",
        "push",
        "transform",
        "verify",
    ),
    "tensorsurgeon.calibrate.options": ("CalibrationOptions", "DataSource"),
    "tensorsurgeon.checkpoint.folder": ("Checkpoint", "open_checkpoint"),
    "tensorsurgeon.errors": ("SurgeonError",),
    "tensorsurgeon.evaluating.result": ("Evaluation",),
    "tensorsurgeon.ops.cast": ("Cast",),
    "tensorsurgeon.ops.concat": ("Concat",),
    "tensorsurgeon.ops.dequantize": ("Dequantize",),
    "tensorsurgeon.ops.drop": ("Drop",),
    "tensorsurgeon.ops.expect": ("Expect",),
    "tensorsurgeon.ops.keep": ("Keep",),
    "tensorsurgeon.ops.quantize": ("Quantize",),
    "tensorsurgeon.ops.rename": ("Rename",),
    "tensorsurgeon.ops.repack": ("Repack",),
    "tensorsurgeon.ops.reshape": ("Reshape",),
    "tensorsurgeon.ops.split": ("Split",),
    "tensorsurgeon.ops.split_experts": ("SplitExperts",),
    "tensorsurgeon.ops.squeeze": ("Squeeze",),
    "tensorsurgeon.ops.stack": ("Stack",),
    "tensorsurgeon.ops.stack_experts": ("StackExperts",),
    "tensorsurgeon.ops.transpose": ("Transpose",),
    "tensorsurgeon.ops.unsqueeze": ("Unsqueeze",),
    "tensorsurgeon.ops.unstack": ("Unstack",),
    "tensorsurgeon.planning.plan": ("Plan",),
    "tensorsurgeon.running.run": ("RunResult",),
    "tensorsurgeon.tensors.spec": ("Region", "SpecMap", "TensorSpec"),
    "tensorsurgeon.planning.rewriting": ("Chain", "Rewrite", "Transform"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CalibrationOptions", "Cast", "Chain", "Checkpoint", "Concat", "DataSource", "Dequantize", "Drop", "Evaluation",
    "Expect", "Keep", "Plan", "Quantize", "Region", "Rename", "Repack", "Reshape", "Rewrite", "RunResult", "SpecMap",
    "Split", "SplitExperts", "Squeeze", "Stack", "StackExperts", "SurgeonError", "TensorSpec", "Transform", "Transpose",
    "Unsqueeze", "Unstack", "__version__", "apply", "card", "describe", "diff", "evaluate", "inspect",
    "open_checkpoint", "page", "plan", "push", "transform", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'tensorsurgeon' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    # `plan` and `transform` are functions here and modules of the package too: importing the module would win.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
