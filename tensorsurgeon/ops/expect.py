"""Refuse tensors that are not laid out as the next steps assume."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tensorsurgeon.errors import RecipeError, SpecError
from tensorsurgeon.models.selecting import selected
from tensorsurgeon.ops.byte_move import ByteMove
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.planning.rewriting import Rewrite
from tensorsurgeon.tensors.spec import SpecMap

_SIZE = re.compile(r"(?:(\d+)\s*\*\s*)?([A-Za-z_][\w|]*)|(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
@typed_fields
class Expect(ByteMove):
    """Check the shape of the tensors that ``where`` selects against the model's config; changes nothing.

    ``shape``: one entry per axis: a number, a key of config.json (``hidden_size``; alternatives with ``|``), a
    multiple (``2*moe_intermediate_size``), or ``any``. ``not_model_type``: model types whose tensors have these
    names but another layout (gpt-oss interleaves gate and up, and both gpt-oss and Llama 4 store the transpose).
    ``dtype``: the element types that are allowed; empty allows all.
    """

    where: tuple[str, ...]
    shape: tuple[str, ...]
    not_model_type: tuple[str, ...] = ()
    dtype: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        names = selected(specs, self.where, self.exclude)
        if not names:
            return ()
        # A multimodal model wraps the text model's config, whose model_type tells the layout.
        text_config = specs.config.get("text_config")
        configs = [specs.config, text_config if isinstance(text_config, dict) else {}]
        found = [str(config.get("model_type", "")) for config in configs]
        refused = [model for model in found if model.startswith(self.not_model_type)]
        if refused:
            raise SpecError(
                f"{next(iter(names))}: a {refused[0]} model stores this tensor transposed or with interleaved halves; "
                "it cannot be split by this rule without mixing gate and up"
            )
        wanted = [_size(entry, specs) for entry in self.shape]
        for name in names:
            spec = specs[name]
            if not _fits(spec.shape, wanted):
                raise SpecError(self._message(name, spec.shape, wanted))
            if self.dtype and spec.dtype.name not in self.dtype:
                raise SpecError(
                    f"{name}: expected {' or '.join(self.dtype)}, found {spec.dtype.name}; a quantized tensor means "
                    "nothing without its scales, dequantize it first"
                )
        return ()

    def _message(self, name: str, shape: tuple[int, ...], wanted: list[int | None]) -> str:
        sizes = zip(self.shape, wanted, strict=True)
        expected = " x ".join(f"{entry} ({size})" if size is not None and not entry.isdigit() else entry for entry, size in sizes)
        turned = None not in wanted and sorted(filter(None, wanted)) == sorted(shape)
        return f"{name}: expected {expected} from the config, found {list(shape)}" + (
            "; it is stored transposed, transpose it first" if turned else ""
        )


def _fits(shape: tuple[int, ...], wanted: list[int | None]) -> bool:
    return len(shape) == len(wanted) and all(w is None or w == n for w, n in zip(wanted, shape, strict=True))


def _size(entry: str, specs: SpecMap) -> int | None:
    """The size an entry stands for; None for ``any``."""
    found = _SIZE.fullmatch(entry.strip())
    if found is None:
        raise RecipeError(f"expect: {entry!r} is no size; write a number, a config key, 2*key or any")
    factor, keys, number = found.groups()
    if number:
        return int(number)
    if keys == "any":
        return None
    for key in keys.split("|"):
        value = specs.config_value(key)
        if isinstance(value, int):
            return value * int(factor or 1)
    raise SpecError(
        f"expect: config.json has no {keys.replace('|', ' or ')}, so the layout of the fused tensors cannot be checked; "
        "put config.json beside the weights"
    )
