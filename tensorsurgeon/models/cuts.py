"""Along which axis engines cut a linear among the ranks of tensor parallelism, by the last part of its name.

What makes features is cut along its outputs, what brings them back together along its inputs (Megatron's rule, which
vLLM and SGLang follow).
"""

from __future__ import annotations

from typing import Final, Literal

Cut = Literal["outputs", "inputs", "unknown"]

_BY_OUTPUTS: Final = {
    "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a",
    "gate_up_proj", "qkv", "qkv_proj", "linear_fc1", "fc", "fc1", "lm_head", "w1", "w3",
}  # fmt: skip
_BY_INPUTS: Final = {"o_proj", "out_proj", "down_proj", "linear_fc2", "fc2", "proj", "w2"}


def cut_of(leaf: str) -> Cut:
    """Along which axis engines cut a linear called so; unknown for names that no engine was asked about."""
    return "outputs" if leaf in _BY_OUTPUTS else "inputs" if leaf in _BY_INPUTS else "unknown"
