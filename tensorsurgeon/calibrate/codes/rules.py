"""What decides how a linear is quantized from its statistics, wherever the arithmetic runs."""

from __future__ import annotations

from typing import Final

import torch

from tensorsurgeon.calibrate.options import CalibrationOptions
from tensorsurgeon.errors import RecipeError
from tensorsurgeon.formats.scales import scale_dtype_of
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.quant.gptq.asymmetric import RIDGE
from tensorsurgeon.quant.gptq.scale_search import StoreScale
from tensorsurgeon.quant.rtn.plain_torch import TORCH_DTYPES
from tensorsurgeon.quant.scheme import Scheme

TUNED: Final = "signround"
_MOST_DAMPING: Final = 2.0
_SHARE: Final = 0.5
_RIDGE_TOKENS: Final = 1.0
_MOST_BITS: Final = 4
_FP4: Final = ("nvfp4", "mxfp4")


def damping_for(damp_percent: float, tokens: int, in_features: int) -> float:
    """Damping for statistics of real text: at least twice in_features / tokens, up to 2.

    Tokens of one text are no independent draws, and few of them make most of a down projection's input, so that GPTQ fits
    noise long after a Hessian has full rank. Measured on the fixture's experts (int4 g128, polished, error on held-out tokens
    over that of rounding to nearest): from 2 tokens per input feature 2.1 at 0.01 and 0.8 at 1; from 4, 1.3 and 0.7; from
    16, 0.61 and 0.55 at 0.1. ``hessian.damp_for_tokens`` is the rule for independent tokens.
    """
    return max(damp_percent, min(_MOST_DAMPING, _MOST_DAMPING * in_features / max(1, tokens)))


def chosen_by(method: str, options: CalibrationOptions) -> str:
    """The method by which a linear alone gets its codes: ``signround`` begins with those of another."""
    if method != TUNED:
        return method
    return "rtn" if options.tuning.start == "rtn" else "gptq"


def is_tuned(plan: Plan, options: CalibrationOptions) -> bool:
    """Whether layers of a plan go through SignRound; RecipeError where that has no text, or is described and not asked for."""
    tuned = any(written.method == TUNED for written in plan.written.values())
    if tuned and not options.sources:
        raise RecipeError(
            "method signround runs the layers on text, which statistics are not", remedy="; give files with {calibration}"
        )
    if options.signround is not None and not tuned:
        raise RecipeError(
            "no step has method signround", remedy=", which {signround} is for; give {method}=signround, or leave it away"
        )
    return tuned


def share_for(scheme: Scheme, method: str, options: CalibrationOptions) -> float:
    """How far a linear's target leans towards the original layers' outputs (``quant.gptq.asymmetric``).

    With signed scales it takes 5 to 8 % of KL off at 4, 3 and 2 bits, and 4 % in FP4; docs/quality.md has the figures.
    """
    if chosen_by(method, options) != "gptq" or not options.sequential:
        return 0.0
    if options.asymmetric is not None:
        return options.asymmetric
    return _SHARE if scheme.type in _FP4 or (scheme.num_bits <= _MOST_BITS and scheme.has_signed_scales) else 0.0


def ridge_for(tokens: int, in_features: int) -> float:
    """What pulls a leaning target back, as a share of the Hessian's mean diagonal: more where tokens are few.

    With two tokens for each input feature the usual ridge fits noise: KL was 6 and 8 % above that without leaning.
    """
    return max(RIDGE, _RIDGE_TOKENS * in_features / max(1, tokens))


def why_rounded(tokens: int, is_finite: bool, fallback_tokens: int) -> str:
    """Why statistics of so many tokens are not used, and the linear is rounded to nearest; empty where they are."""
    if not tokens:
        return "saw no calibration token"
    if not is_finite:
        return "saw inputs that are not finite"
    if tokens < fallback_tokens:
        return f"saw fewer than {fallback_tokens} calibration tokens"
    return ""


ALL_ZERO: Final = "saw inputs that are all zero"
NOT_REACHED: Final = "is in a layer that the model does not run for text alone"


def stored_dtype_of(scheme: Scheme) -> torch.dtype:
    """The dtype in which the format stores scales under this (resolved) scheme."""
    return TORCH_DTYPES[scale_dtype_of(scheme)]


def store_scale_of(scheme: Scheme) -> StoreScale:
    """Rounds scales to what the format stores under this (resolved) scheme."""
    stored = stored_dtype_of(scheme)
    return lambda scale: scale.to(stored).to(torch.float32)
