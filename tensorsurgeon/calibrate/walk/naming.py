"""Which tensors of a checkpoint make which parameters of transformers' model, and which rows become which.

Checkpoints name and stack their tensors differently from the module that computes with them (experts one by one or
fused), and transformers knows how to go from one to the other. Its own conversion is run here on tensors that hold row
numbers instead of weights: what comes out says where each row of a parameter came from, for any model it knows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.tensors.spec import TensorSpec


class Loading(NamedTuple):
    """Checkpoint tensors that make one or several parameters: ``converter`` None is a plain renaming."""

    target: str
    sources: tuple[tuple[str, str], ...]
    converter: Any

    @property
    def names(self) -> list[str]:
        """The checkpoint tensors."""
        return [name for _, name in self.sources]


class ParameterRows(NamedTuple):
    """A run of rows of a parameter seen as ``[-1, last axis]``."""

    parameter: str
    start: int
    stop: int


@dataclass
class NameMap:
    """Loadings by target, and checkpoint tensors that belong to no parameter of the model."""

    loadings: list[Loading]
    outside: list[str]
    config: Any
    model: Any = field(repr=False)

    def convert(self, loading: Loading, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that a loading makes, by their full names."""
        if loading.converter is None:
            return {loading.target: tensors[loading.sources[0][1]]}
        converter = deepcopy(loading.converter)
        collected: dict[str, list[Tensor]] = defaultdict(list)
        for pattern, name in loading.sources:
            collected[pattern].append(tensors[name])
        converter.collected_tensors = collected
        made = converter.convert(loading.target, model=self.model, config=self.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def map_names(model: Any, names: Sequence[str]) -> NameMap:
    """Match checkpoint names to the parameters of a transformers model, as its ``from_pretrained`` does."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    used: dict[str, Any] = {}
    outside = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            outside.append(name)
            continue
        found[target].append((pattern or name, name))
        used[target] = None if pattern is None else by_pattern[pattern]
    loadings = [Loading(target, tuple(sources), used[target]) for target, sources in found.items()]
    return NameMap(loadings, outside, model.config, model)


def trace_rows(
    names: NameMap, loadings: Sequence[Loading], specs: Mapping[str, TensorSpec], shapes: Mapping[str, torch.Size]
) -> dict[str, list[tuple[int, ParameterRows]]]:
    """For each checkpoint tensor, runs of its rows: (first row, rows of a parameter), in order.

    ``shapes`` are those of the parameters. Rows that a conversion tears apart (a transposed weight) are in no run.
    """
    result: dict[str, list[tuple[int, ParameterRows]]] = {}
    for loading in loadings:
        matrices = [name for name in loading.names if len(specs[name].shape) >= 2]
        if len(matrices) < len(loading.names):
            continue
        bases: dict[str, int] = {}
        markers: dict[str, Tensor] = {}
        total = 0
        for name in matrices:
            spec = specs[name]
            bases[name] = total
            markers[name] = torch.arange(total, total + spec.rows).reshape(*spec.shape[:-1], 1)
            total += spec.rows
        try:
            made = names.convert(loading, markers)
        except (RuntimeError, ValueError, IndexError):
            continue
        owner = np.full(total, -1, np.int64)
        row = np.zeros(total, np.int64)
        targets = sorted(made)
        for number, target in enumerate(targets):
            marks = made[target].reshape(-1).numpy()
            if target not in shapes or len(shapes[target]) < 2 or marks.size != shapes[target][:-1].numel():
                continue
            owner[marks] = number
            row[marks] = np.arange(marks.size)
        for name in matrices:
            part = slice(bases[name], bases[name] + specs[name].rows)
            result[name] = list(_runs(owner[part], row[part], targets))
    return result


def _runs(owner: np.ndarray, row: np.ndarray, targets: Sequence[str]) -> list[tuple[int, ParameterRows]]:
    breaks = np.flatnonzero((np.diff(owner) != 0) | (np.diff(row) != 1)) + 1
    runs = []
    for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(owner)], strict=True):
        if owner[start] >= 0:
            runs.append((start, ParameterRows(targets[owner[start]], int(row[start]), int(row[start]) + stop - start)))
    return runs


def rows_of(runs: Sequence[tuple[int, ParameterRows]], start: int, stop: int) -> list[ParameterRows] | None:
    """The parameter rows that rows ``start`` to ``stop`` of a checkpoint tensor became, in order; None if some are in none."""
    result = []
    position = start
    for first, (parameter, row, end) in runs:
        last = first + end - row
        if last <= position or first >= stop:
            continue
        if first > position:
            return None
        cut = min(last, stop)
        result.append(ParameterRows(parameter, row + position - first, row + cut - first))
        position = cut
    return result if position == stop else None
