"""Linears that multiply quantized inputs, as the engines of W8A8, FP8 and NVFP4 checkpoints do it.

Which weight a product is with is told by where its bytes lie: that holds for a linear of its own and for one expert of
a stack alike, and needs no knowledge of the model's code.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tensorsurgeon.calibrate.walk.lines import Lines, Traced
from tensorsurgeon.errors import PlanError
from tensorsurgeon.formats.inputs import InputRule
from tensorsurgeon.quant.inputs import InputScheme, quantized_inputs

_linear: Callable[..., Tensor] = nn.functional.linear


class _Placed(NamedTuple):
    """A parameter whose rows multiply quantized inputs: first byte, one past the last, and the rule of each row (-1: none)."""

    start: int
    stop: int
    name: str
    row_bytes: int
    rules: np.ndarray


class LayerInputs:
    """The rules of one loaded layer; ``quantizing`` is entered in each thread that runs it."""

    def __init__(
        self,
        layer_name: str,
        layer: nn.Module,
        rules: Mapping[str, InputRule],
        rows: Mapping[str, int],
        traced: Traced,
        number: Callable[[str], float],
    ) -> None:
        """``rules`` and ``rows`` (how many there are) by module; ``traced``: where the rows of each checkpoint tensor lie.

        ``number`` reads a static scale.
        """
        self._rules = list(dict.fromkeys(rules.values()))
        self._scales = [None if rule.scale is None else static_scale(rule, number) for rule in self._rules]
        indices = {rule: index for index, rule in enumerate(self._rules)}
        by_parameter: dict[str, np.ndarray] = {}
        for module, rule in rules.items():
            weight = f"{module}.weight"
            found = traced.became(Lines(weight, 0, rows[module]))
            if not found or any(lines.turned for lines in found):
                raise PlanError(
                    f"{module}: its inputs are quantized by the config, and its rows cannot be found in transformers' model",
                    remedy="; evaluate the weights alone ({float_inputs})",
                )
            for lines in found:
                parameter = layer.get_parameter(lines.name.removeprefix(f"{layer_name}."))
                marks = by_parameter.setdefault(lines.name, np.full(parameter[..., 0].numel(), -1, np.int32))
                marks[lines.start : lines.stop : lines.step] = indices[rule]
        self._placed = sorted(_places(layer_name, layer, by_parameter))
        self._starts = [placed.start for placed in self._placed]
        self._seen: set[str] = set()

    def quantizing(self) -> _Quantizing:
        """A context in which this layer's products are those of quantized inputs."""
        return _Quantizing(self)

    def check_seen(self) -> None:
        """Raise PlanError for a parameter whose product never came by: it was made in a way that is not watched here."""
        for placed in self._placed:
            if placed.name not in self._seen:
                raise PlanError(
                    f"{placed.name}: its inputs are quantized by the config, and transformers multiplies it in a way that "
                    "cannot be watched",
                    remedy="; evaluate the weights alone ({float_inputs})",
                )

    def of(self, weight: Tensor) -> tuple[InputScheme, float | None] | None:
        """How the inputs of a product with this weight are quantized; None if they are not."""
        at = bisect_right(self._starts, weight.data_ptr()) - 1
        if at < 0 or weight.data_ptr() >= self._placed[at].stop:
            return None
        placed = self._placed[at]
        self._seen.add(placed.name)
        first = (weight.data_ptr() - placed.start) // placed.row_bytes
        found = set(placed.rules[first : first + weight.shape[0]].tolist())
        schemes = {None if index < 0 else self._rules[index].scheme for index in found}
        if len(schemes) != 1 or not weight.is_contiguous():
            raise PlanError(f"{placed.name}: rows that are multiplied together have inputs quantized in different ways")
        (scheme,) = schemes
        if scheme is None:
            return None
        # Parts that are multiplied as one share the widest range, as engines that fuse them take it.
        scales = [scale for index in found if (scale := self._scales[index]) is not None]
        return scheme, (None if not scales else min(scales) if scheme.type == "nvfp4" else max(scales))


def _places(layer_name: str, layer: nn.Module, rules: Mapping[str, np.ndarray]) -> Iterable[_Placed]:
    for name, marks in rules.items():
        parameter = layer.get_parameter(name.removeprefix(f"{layer_name}."))
        nbytes = parameter.numel() * parameter.element_size()
        start = parameter.data_ptr()
        yield _Placed(start, start + nbytes, name, parameter.shape[-1] * parameter.element_size(), marks)


def static_scale(rule: InputRule, number: Callable[[str], float]) -> float:
    """The static scale of a rule as ``quantized_inputs`` takes it; ``number`` reads the tensor."""
    assert rule.scale is not None
    value = number(rule.scale)
    return 1 / value if rule.is_reciprocal else value


class _Quantizing(TorchFunctionMode):
    def __init__(self, inputs: LayerInputs) -> None:
        super().__init__()
        self._inputs = inputs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _linear:
            return func(*args, **(kwargs or {}))
        return self._multiply(*args, **(kwargs or {}))

    def _multiply(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = self._inputs.of(weight)
        if found is None:
            return _linear(inputs, weight, bias)
        scheme, scale = found
        return product(inputs, weight, bias, scheme, scale)


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None, scheme: InputScheme, scale: float | None) -> Tensor:
    """The linear of quantized inputs: summed in F32 as kernels sum codes, rounded once."""
    made = torch.nn.functional.linear(quantized_inputs(inputs, scheme, scale), weight.float())
    return (made if bias is None else made + bias.float()).to(inputs.dtype)
