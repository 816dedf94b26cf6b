"""Buffers that no checkpoint holds (rotary frequencies, masks), made as transformers itself makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensorsurgeon.calibrate.walk.instead import ROUND_INSTEAD
from tensorsurgeon.errors import PlanError


class Buffers:
    """Makes the buffers of a model on the meta device where a module is to be run; ``build`` makes the model anew."""

    def __init__(self, model: Any, build: Callable[[], Any], device: torch.device) -> None:
        self._model = model
        self._build = build
        self._device = device
        self._from_init: dict[str, Tensor] | None = None

    def make(self, prefix: str, module: nn.Module, excluded: Sequence[nn.Module] = ()) -> None:
        """Compute those of ``module``, called ``prefix``, but for the modules ``excluded``, as after loading.

        transformers makes most of them where it initialises weights. One that it leaves as it is there was made when its
        class was built. PlanError for one that neither makes.
        """
        from transformers import PreTrainedModel

        skipped = {id(part) for layer in excluded for part in layer.modules()}
        for name, part in module.named_modules():
            lost = [
                key for key in part._non_persistent_buffers_set if (value := part._buffers.get(key)) is not None and value.is_meta
            ]
            if id(part) in skipped or not lost:
                continue
            full = f"{prefix}.{name}".strip(".")
            made = self._initialised(part, lost, _nearest(self._model, full, PreTrainedModel))
            for key in lost:
                value = made.get(key)
                if value is None:
                    value = self._built(f"{full}.{key}".strip("."), part._buffers[key])
                part._buffers[key] = value.to(self._device)

    def _initialised(self, part: nn.Module, keys: Sequence[str], owner: Any) -> dict[str, Tensor]:
        """The buffers that initialisation sets: whatever lies in them before, they are the same after."""
        found: list[dict[str, Tensor]] = []
        shapes = {key: _held(part._buffers, key) for key in keys}
        for filler in (0, 1):
            for key in keys:
                part._buffers[key] = torch.full_like(shapes[key], _unset(shapes[key].dtype, filler), device="cpu")
            with torch.no_grad():
                owner._init_weights(part)
            found.append({key: _held(part._buffers, key) for key in keys})
        return {key: value for key, value in found[0].items() if torch.equal(value, found[1][key])}

    def _built(self, name: str, known: Tensor | None) -> Tensor:
        if self._from_init is None:
            with _parameters_on_meta(), torch.no_grad():
                self._from_init = dict(self._build().named_buffers())
        value = self._from_init.get(name)
        if value is None or value.is_meta or known is None or value.shape != known.shape:
            raise PlanError(
                f"{name}: transformers does not say how this buffer is made; {type(self._model).__name__} cannot be walked",
                remedy=ROUND_INSTEAD,
            )
        return value.to(known.dtype)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are built keep their buffers, and have parameters without elements."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _held(buffers: dict[str, Tensor | None], key: str) -> Tensor:
    value = buffers[key]
    assert value is not None
    return value


def _unset(dtype: torch.dtype, filler: int) -> float | int:
    if dtype.is_floating_point:
        return float(filler)
    return filler if dtype == torch.bool else torch.iinfo(dtype).min + filler


def _nearest(model: Any, name: str, kind: type) -> Any:
    """The module of a class that holds ``name``, innermost first."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:length]))
        if isinstance(module, kind):
            return module
    return model
