"""The layouts of published families that lie beside the repository, ../shared/families/skeletons.py.

Header-only checkpoints, and the four conversions: none silently wrong, none in a traceback, each refusal by a tensor's name. What
should be quantized is restated here by hand, from what engines build without a config and from what is no linear: nothing of
`models/` is asked. Skipped where that folder is not beside the repository.
"""

from __future__ import annotations

import re
import runpy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.recipes.library import load_transform

ROOT = Path(__file__).parents[2]
SHOWN = next(filter(Path.exists, (up / "shared/families/skeletons.py" for up in ROOT.parents)), None)
pytestmark = pytest.mark.skipif(SHOWN is None, reason="no ../shared/families/skeletons.py beside the repository")
CONVERSIONS = ("ct-w4a16-g32", "ct-w8a8-int8", "nvfp4a16", "fp8-block")

# What must stay as it is, wherever it lies: routers and gates, heads of multi-token prediction, towers and projectors, indexers,
# hyper-connections, what mixes embeddings; Jamba's Mamba, which vLLM builds without a config; convolutions and norms.
STAYS = re.compile(
    r"""(^|\.)(router|gate|shared_expert_gate|wg|indexer|altup\w*|\w*hyper_connection|ple|mtp|vision\w*|visual|audio\w*
    |multi_modal_projector|mm_projector|compressor)(\.|$)|\.(\w*norm|\w*norm_?\d?|conv1d|conv|embed\w*)$|^model\.layers\.2\.|^jamba\..*\.mamba\.""",
    re.VERBOSE,
)
# Either choice loads and computes: a row per head, or of low rank; what vLLM runs as one linear with the indexer's projection.
MAY = re.compile(r"\.(in_proj_(a|b|ba)|laurel\S*|per_layer_\w+)$|^qwen4_exp\..*\.self_attn\.[qkv]_proj$")
LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
# What a quantized source has beside a weight.
BESIDE = re.compile(
    r"(_scale(_inv|_2)?|\.scale|_scales|_shape|_global_scale|input_scale|activation_scale|bias|_bias|sinks|A_log|dt_bias|\.D)$"
)


def folded(name: str) -> str:
    """A module with its numbers masked; all experts of a layer are one, however they are stored."""
    name = re.sub(r"\.weight(_packed)?$|_blocks$", "", name)
    name = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
    name = re.sub(r"(block_sparse_moe)\.(input|output)_linear$", r"\1.experts", name)
    return re.sub(r"((^|\.)experts)(\..*|$)", r"\1", name)


def wanted(family: str, tensors: list[tuple[str, tuple[int, ...]]]) -> set[str]:
    """The linears of the decoder layers but those that stay."""
    names = (name for name, shape in tensors if len(shape) >= 2 and LAYER.search(name) and not BESIDE.search(name))
    modules = {re.sub(r"\.weight(_packed)?$", "", name) for name in names}
    return {folded(module) for module in modules if not STAYS.search(module) and not STAYS.search(f"{family}.{module}")}


def cases() -> Iterator[str]:
    yield from runpy.run_path(str(SHOWN))["F"] if SHOWN else ()


def outcome(family: str, transform: str, folder: Path) -> str:
    """right, refused, or what is wrong with the plan."""
    shown = runpy.run_path(str(SHOWN))
    if not (folder / family).exists():
        shown["write"](str(folder), family)
    tensors = [(entry[0], tuple(entry[1])) for entry in shown["F"][family]()[1]]
    try:
        plan = make_plan(load_transform(transform), open_checkpoint(folder / family))
    except SurgeonError as error:
        modules = {name.rpartition(".")[0] for name, _ in tensors} - {""}
        return "refused" if any(module in str(error) for module in modules) else f"refused without a name: {error}"
    taken = {folded(name) for name in plan.quantized}
    should = wanted(family, tensors)
    if wrong := {name for name in taken - should if not MAY.search(f"{family}.{name}")}:
        return f"takes {sorted(wrong)}"
    if missed := {name for name in should - taken if not MAY.search(f"{family}.{name}")}:
        return f"leaves {sorted(missed)}"
    return "right"


@pytest.mark.parametrize("family", cases())
def test_no_layout_is_silently_wrong(family: str, tmp_path: Path) -> None:
    found = {transform: outcome(family, transform, tmp_path) for transform in CONVERSIONS}
    assert {transform: word for transform, word in found.items() if word not in ("right", "refused")} == {}


def test_most_are_right(tmp_path: Path) -> None:
    """45 of 51 are asked for; of the 39 shown the same share, rounded up."""
    families = list(cases())
    right = Counter(all(outcome(family, transform, tmp_path) == "right" for transform in CONVERSIONS) for family in families)[
        True
    ]
    assert right * 51 >= 45 * len(families), f"{right} of {len(families)}"
