"""What a tensor is for, in one word: the vocabulary that transforms, formats, engines and reports share.

A role belongs to a module and to everything that lies with it: weight, bias, codes, scales. Whether a tensor of that
role is a matrix that can be quantized is another question, which its shape answers.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple


class Role(StrEnum):
    """The roles. Those of ``PARTS`` are whole parts of a model, within which tensors have a role of their own."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    CONVOLUTION = "convolution"
    ROUTER = "router"
    SHARED_EXPERT_GATE = "shared-expert-gate"
    ATTENTION = "attention"
    MLP = "mlp"
    EXPERT = "expert"
    SHARED_EXPERT = "shared-expert"
    LINEAR_ATTENTION = "linear-attention"
    """Linear attention, state spaces and gated convolutions: whatever mixes tokens and keeps no keys and values."""
    LINEAR_ATTENTION_GATE = "linear-attention-gate"
    """Its narrow projections, one row per head: decay and write strength."""
    INDEXER = "indexer"
    """Chooses what sparse attention looks at."""
    RESIDUAL = "residual"
    """Hyper-connections and their kind: what is put between layers, per-layer embeddings included."""
    ADAPTER = "adapter"
    """Matrices of low rank beside a linear."""
    MTP = "mtp"
    """The head for multi-token prediction, which speculative decoding drafts with."""
    VISION = "vision"
    AUDIO = "audio"
    PROJECTOR = "projector"
    """Brings what a tower saw or heard into the text model."""
    OTHER = "other"
    """Known to be none of these."""


PARTS: Final = frozenset((Role.MTP, Role.VISION, Role.AUDIO, Role.PROJECTOR))

LINEARS: Final = frozenset(
    (
        Role.ATTENTION,
        Role.MLP,
        Role.EXPERT,
        Role.SHARED_EXPERT,
        Role.LINEAR_ATTENTION,
        Role.LINEAR_ATTENTION_GATE,
    )
)
"""Linears of the decoder layers, which engines build with a quantization config."""

NO_LINEARS: Final = frozenset((Role.EMBEDDING, Role.NORM, Role.CONVOLUTION))
"""Modules that may hold a matrix and multiply nothing by it as a linear does."""

WITHOUT_CONFIG: Final = frozenset((Role.ROUTER, Role.SHARED_EXPERT_GATE))
"""Linears that engines build without a quantization config, so that scales beside them have no place."""


class Use(NamedTuple):
    """What a tensor is for. ``role``: None where neither a table nor a rule decides it. ``within``: inside a part, what it
    would be in the main model. ``how``: what decided, in words. ``has_config``: whether engines build it with a
    quantization config, as far as is known."""

    role: Role | None
    within: Role | None
    how: str
    has_config: bool = True

    @property
    def kind(self) -> Role | None:
        """The role, seen through the part: the attention of a vision tower is attention."""
        return self.within if self.role in PARTS else self.role

    def __str__(self) -> str:
        if self.role is None:
            return "unknown"
        return f"{self.role}.{self.within}" if self.within not in (None, Role.OTHER) else str(self.role)
