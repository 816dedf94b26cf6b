"""Several formats in one checkpoint: which can stand in one config, and that config.

compressed-tensors alone has a config for it (``mixed-precision``): each group says its layout.
"""

from __future__ import annotations

from collections.abc import Mapping

from tensorsurgeon.errors import PlanError, RecipeError
from tensorsurgeon.formats.base import ConfigFiles, Format, QuantizedModel
from tensorsurgeon.formats.coverage import layout_of
from tensorsurgeon.formats.ct_config import CtFormat, GroupArgs, write_config
from tensorsurgeon.formats.registry import name_of
from tensorsurgeon.quant.scheme import Scheme


def mixed_config_files(model: QuantizedModel, ways: Mapping[Format, tuple[set[Scheme], set[str | None]]]) -> ConfigFiles:
    """The config of modules in several formats; ``ways``: the schemes and activations that each was written with.

    PlanError for formats that no one config describes, and where two formats write modules that a config cannot tell
    apart.
    """
    arguments: dict[Scheme, GroupArgs] = {}
    for layout, (schemes, activations) in ways.items():
        if not isinstance(layout, CtFormat):
            names = " and ".join(sorted(map(name_of, ways)))
            raise PlanError(
                f"steps write {names}, but a checkpoint has one quantization_config, and only formats of compressed-tensors "
                "(ct-...) can stand side by side in one; use those, or one format for all steps"
            )
        given = {layout.activations[0] if one is None else one for one in activations}
        if len(given) > 1 or not given <= set(layout.activations):
            raise RecipeError(
                f"{layout.name} takes activations {' or '.join(layout.activations)}, one for all of its modules, found "
                f"{' and '.join(sorted(given))}"
            )
        for scheme in map(layout_of, schemes):
            other = arguments.setdefault(scheme, layout.group_args(given.copy().pop()))
            if other.layout not in layout.words:
                raise PlanError(f"{layout.name} and {other.layout} write the same codes ({scheme}); choose one of them")
    return write_config(model, arguments.__getitem__)
