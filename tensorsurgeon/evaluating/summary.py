"""From distances of tokens to the figures that are published: means with standard errors over sequences, quantiles."""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

_QUANTILES: Final = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


class Mean(NamedTuple):
    """A mean over tokens and its standard error over sequences; None for a single sequence."""

    value: float
    error: float | None


def mean_of(values: Tensor, counted: Tensor) -> Mean:
    """Of values [samples, length] at the tokens that are ``counted``; tokens of a sequence are no independent draws."""
    weights = counted.sum(1).double()
    sums = torch.where(counted, values, 0.0).sum(1)
    mean = float(sums.sum() / weights.sum())
    if len(values) < 2:
        return Mean(mean, None)
    apart = sums - mean * weights
    n = len(values)
    return Mean(mean, float((apart.square().sum() * n / (n - 1)).sqrt() / weights.sum()))


def quantiles_of(values: Tensor, counted: Tensor) -> dict[str, float]:
    """50, 95 and 99 % of the tokens are below, and the largest."""
    ordered = values[counted].sort().values
    found = {name: float(ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)]) for name, q in _QUANTILES.items()}
    return {**found, "max": float(ordered[-1])}


def likelihood(nll: Tensor, scored: Tensor) -> dict[str, Any]:
    """``nll``, its standard error, and the perplexity."""
    mean = mean_of(nll, scored)
    return {"nll": mean.value, "nll_se": mean.error, "perplexity": math.exp(mean.value) if mean.value < 700 else math.inf}


def distance(forward: Tensor, reverse: Tensor, agree: Tensor, counted: Tensor) -> dict[str, Any]:
    """KL in both directions with errors and quantiles, and how often the likeliest token is the same."""
    kl, back, same = mean_of(forward, counted), mean_of(reverse, counted), mean_of(agree.double(), counted)
    return {
        "kl": kl.value,
        "kl_se": kl.error,
        "kl_quantiles": quantiles_of(forward, counted),
        "reverse_kl": back.value,
        "reverse_kl_se": back.error,
        "reverse_kl_quantiles": quantiles_of(reverse, counted),
        "top1_agreement": same.value,
        "top1_agreement_se": same.error,
    }
