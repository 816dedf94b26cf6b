"""What a calibrated run is told: data, how experts are fed, how GPTQ works. All of it is part of the result's bits."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from tensorsurgeon.errors import RecipeError, did_you_mean
from tensorsurgeon.quant.gptq.gptq import GptqOptions
from tensorsurgeon.quant.gptq.polish import Polish
from tensorsurgeon.quant.signround.options import SignRound

ExpertFeeding = Literal["routed", "all", "balanced"]
ExpertHessian = Literal["shared", "own"]

EXPERT_FEEDINGS: Final = ("routed", "all", "balanced")
EXPERT_HESSIANS: Final = ("shared", "own")


@dataclass(frozen=True, slots=True)
class DataSource:
    """A file of text, chats or token ids, or the name of a Hub data set, and its share of the samples."""

    location: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> DataSource:
        """``FILE`` or ``FILE:WEIGHT``; a colon that no number follows belongs to the name."""
        location, colon, weight = text.rpartition(":")
        if not colon or os.path.exists(text):
            return cls(text)
        try:
            share = float(weight)
        except ValueError:
            return cls(text)
        if not 0 < share < float("inf"):
            raise RecipeError(f"calibration data {text}: the weight must be positive, found {weight}")
        return cls(location, share)


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """How statistics are gathered and used.

    ``samples`` chunks of ``sequence_length`` tokens are drawn from ``sources`` with ``seed``.
    ``experts``: ``routed`` feeds each expert what the router sends it; ``all`` every token; ``balanced`` what is routed,
    topped up to ``minimum_tokens`` with the tokens whose router logits for it are highest.
    ``expert_hessian``: the gate and up projections of a layer's experts ``shared`` one Hessian over all tokens, or have
    their ``own`` over the tokens each is fed.
    ``fallback_tokens``: modules that saw fewer are rounded to nearest instead.
    ``sequential``: a quantized layer's outputs feed the next layer; otherwise the original ones do.
    ``asymmetric``: how far a linear's target leans towards what the original layers' outputs would give, 0 to 1
    (``quant.gptq.asymmetric``); None: half at up to 4 bits with signed scales, else not at all. It carries the original layers'
    states beside the others, and needs ``sequential``.
    ``signround``: how layers are tuned whose linears have that method; None: by default.
    ``write_statistics`` and ``read_statistics`` name a folder of statistics to keep, or to use instead of a walk.
    """

    sources: tuple[DataSource, ...] = ()
    samples: int = 256
    sequence_length: int = 2048
    seed: int = 0
    experts: ExpertFeeding = "balanced"
    expert_hessian: ExpertHessian = "shared"
    minimum_tokens: int = 512
    fallback_tokens: int = 8
    sequential: bool = True
    asymmetric: float | None = None
    gptq: GptqOptions = field(default_factory=lambda: CalibrationOptions.default_gptq())
    signround: SignRound | None = None
    write_statistics: Path | None = None
    read_statistics: Path | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "sequence_length"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.minimum_tokens < 0 or self.fallback_tokens < 0:
            raise RecipeError("minimum_tokens and fallback_tokens must not be negative")
        if self.asymmetric is not None and not 0.0 <= self.asymmetric <= 1.0:
            raise RecipeError(f"asymmetric must be 0 to 1, found {self.asymmetric}")
        if self.asymmetric and not self.sequential:
            raise RecipeError(
                "asymmetric makes up for errors of layers before, which layers fed with original outputs do not see"
            )
        for name, known in (("experts", EXPERT_FEEDINGS), ("expert_hessian", EXPERT_HESSIANS)):
            if getattr(self, name) not in known:
                raise RecipeError(f"unknown {name} {getattr(self, name)!r}{did_you_mean(getattr(self, name), known)}")
        if not self.sources and self.read_statistics is None:
            raise RecipeError(
                "calibration needs data", remedy="; give files with {calibration}, or a folder with {read_statistics}"
            )
        if self.sources and self.read_statistics is not None:
            raise RecipeError(
                "statistics that are read replace the walk, and data would not be looked at",
                remedy="; give {read_statistics} or {calibration}, and not both",
            )

    @staticmethod
    def default_gptq() -> GptqOptions:
        """GPTQ as it is run where nothing is said."""
        return GptqOptions(polish=Polish())

    @property
    def tuning(self) -> SignRound:
        """How layers are tuned, where a step asks for it."""
        return self.signround or SignRound()

    def identity(self) -> dict[str, Any]:
        """What decides the result apart from the data, in a form that JSON holds; no paths of this machine."""
        known = asdict(self)
        for name in ("sources", "write_statistics", "read_statistics"):
            del known[name]
        if self.signround is None:
            del known["signround"]
        return known
