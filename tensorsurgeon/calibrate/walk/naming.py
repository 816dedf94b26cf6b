"""Which tensors of a checkpoint make which parameters of transformers' model, and which rows become which.

Checkpoints name and stack their tensors differently from the module that computes with them (experts one by one or
fused), and transformers knows how to go from one to the other. Its own conversion is run here on tensors that hold row
numbers, or of columns, instead of weights: what comes out says where each line of a parameter came from, for any model it
knows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.calibrate.walk.lines import Lines, Run, Traced
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


@dataclass
class NameMap:
    """Loadings by target, and checkpoint tensors that belong to no parameter of the model."""

    loadings: list[Loading]
    outside: list[str]
    config: Any
    model: Any = field(repr=False)

    def convert(
        self, loading: Loading, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> dict[str, Tensor]:
        """The parameters that a loading makes, by their full names; ``shapes`` of the tensors that markers stand for."""
        if loading.converter is None:
            return {loading.target: tensors[loading.sources[0][1]]}
        converter = deepcopy(loading.converter)
        if shapes is not None:
            self._settle(converter, loading, shapes)
        collected: dict[str, list[Tensor]] = defaultdict(list)
        for pattern, name in loading.sources:
            collected[pattern].append(tensors[name])
        converter.collected_tensors = collected
        made = converter.convert(loading.target, model=self.model, config=self.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _settle(self, converter: Any, loading: Loading, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Decide by the tensors' shapes what operations would decide by those of markers: transpose unless it fits already."""
        expected = tuple(self.model.get_parameter(loading.target).shape)
        for op in converter.operations:
            if getattr(op, "check_dims", False):
                op.check_dims = False
                if all(shapes[name] == expected for name in loading.names):
                    op.dim1 = op.dim0


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


def trace_lines(
    names: NameMap, loadings: Sequence[Loading], specs: Mapping[str, TensorSpec], shapes: Mapping[str, torch.Size]
) -> Traced:
    """What the lines of a layer's checkpoint tensors became.

    ``shapes`` are those of the parameters. Lines that a conversion tears apart are in no run.
    """
    result = Traced()
    for loading in loadings:
        matrices = {name: specs[name] for name in loading.names if len(specs[name].shape) >= 2}
        if len(matrices) < len(loading.names):
            continue
        for turned in (False, True):
            bases: dict[str, int] = {}
            markers: dict[str, Tensor] = {}
            total = 0
            for name, spec in matrices.items():
                shape = (*spec.shape[:-2], 1, spec.shape[-1]) if turned else (*spec.shape[:-1], 1)
                count = prod(shape)
                bases[name] = total
                markers[name] = torch.arange(total, total + count).reshape(shape)
                total += count
            try:
                made = names.convert(loading, markers, {name: spec.shape for name, spec in matrices.items()})
            except (RuntimeError, ValueError, IndexError):
                continue
            owner = np.full(total, -1, np.int64)
            line = np.zeros(total, np.int64)
            targets: list[tuple[str, int]] = []
            for target in sorted(made):
                shape, found = tuple(shapes.get(target, ())), tuple(made[target].shape)
                if len(shape) < 2 or found not in ((*shape[:-1], 1), (*shape[:-2], 1, shape[-1])):
                    continue
                marks = made[target].reshape(-1).numpy()
                owner[marks] = len(targets)
                line[marks] = np.arange(marks.size)
                targets.append((target, 0 if found == (*shape[:-1], 1) else shape[-2]))
            for name, spec in matrices.items():
                part = slice(bases[name], bases[name] + markers[name].numel())
                result.widths[name] = spec.shape[-1]
                result.runs[name, spec.shape[-2] if turned else 0] = list(_runs(owner[part], line[part], targets))
    return result


def _runs(owner: np.ndarray, line: np.ndarray, targets: Sequence[tuple[str, int]]) -> list[Run]:
    breaks = np.flatnonzero((np.diff(owner) != 0) | (np.diff(line) != 1)) + 1
    runs = []
    for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(owner)], strict=True):
        if owner[start] >= 0:
            target, turned = targets[owner[start]]
            runs.append((start, Lines(target, int(line[start]), int(line[start]) + stop - start, turned=turned)))
    return runs
