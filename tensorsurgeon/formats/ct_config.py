"""The ``quantization_config`` of compressed-tensors, for all of its layouts.

``QuantizationArgs`` and ``QuantizationScheme`` refuse keys they do not know, so only keys of the oldest version that
vLLM and SGLang still pin are written, with every null: old readers want them and new ones accept them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, NamedTuple

from tensorsurgeon.errors import ConfigError
from tensorsurgeon.formats.base import ConfigFiles, Format, QuantizedModel, Word
from tensorsurgeon.formats.config_reading import TOP, only_keys, schemes_of, section, strings
from tensorsurgeon.formats.coverage import activations_of, cover
from tensorsurgeon.formats.ct_targets import Matcher, ignore_list, target_lists
from tensorsurgeon.quant.scheme import Scheme
from tensorsurgeon.tensors.spec import SpecMap

DIALECT: Final = "0.15.0"
"""The compressed-tensors version whose keys are written: vLLM 0.21 pins 0.15, later readers accept it."""

MIXED: Final = "mixed-precision"
"""The ``format`` of a config whose groups have several; never that of a group."""

_ARGS_KEYS: Final = (
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype",
)  # fmt: skip
_GROUP_KEYS: Final = ("targets", "weights", "input_activations", "output_activations", "format")


ELSEWHERE: Final = Scheme(num_bits=0)
"""Stands for the scheme of a group in another layout, which that layout's format reads."""


class WeightArgs(NamedTuple):
    """One group's ``weights`` as read, with the path to name in messages."""

    args: Mapping[str, Any]
    path: str


def args(num_bits: int, kind: str, strategy: str, **changed: Any) -> dict[str, Any]:
    """``QuantizationArgs`` with every key that compressed-tensors 0.15 knows."""
    written: dict[str, Any] = {
        "num_bits": num_bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {**written, **changed}


def dynamic_args(num_bits: int, kind: str, strategy: str = "token", **changed: Any) -> dict[str, Any]:
    """``QuantizationArgs`` of activations that are quantized while running, which nothing observes."""
    return args(num_bits, kind, strategy, dynamic=True, observer=None, **changed)


def _layouts(config: Mapping[str, Any]) -> tuple[str | None, ...]:
    groups = config.get("config_groups")
    listed = groups.values() if isinstance(groups, Mapping) else ()
    return tuple(dict.fromkeys(layout_of_group(group, config) for group in listed if isinstance(group, Mapping)))


def layout_of_group(group: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """``format`` of the group or else of the config; where that is ``mixed-precision``, what the arguments say."""
    said = group.get("format") or config.get("format")
    weights = group.get("weights")
    if said != MIXED or not isinstance(weights, Mapping):
        return said if isinstance(said, str) else None
    if weights.get("type") == "float" and weights.get("num_bits") == 4:
        return "nvfp4-pack-quantized" if weights.get("strategy") == "tensor_group" else "mxfp4-pack-quantized"
    if weights.get("type") == "float":
        return "float-quantized"
    return "int-quantized" if group.get("input_activations") and weights.get("num_bits") == 8 else "pack-quantized"


class GroupArgs(NamedTuple):
    """What a layout writes into a group: its ``format``, and the arguments of weights and inputs under a scheme."""

    layout: str
    weights: Callable[[Scheme], dict[str, Any]]
    inputs: Callable[[Scheme], dict[str, Any] | None]


class CtFormat(Format):
    """A layout of compressed-tensors: its modules are groups, which may lie beside those of other layouts."""

    __slots__ = ()
    quant_method: ClassVar[str] = "compressed-tensors"

    @staticmethod
    def word_in(config: Mapping[str, Any], specs: SpecMap) -> Word:
        """The layout of each group (``format``), or what its arguments make it; one for each that there is."""
        return Word(f"{TOP}.format", _layouts(config) or (config.get("format"),))

    @abstractmethod
    def group_args(self, activations: str) -> GroupArgs:
        """What groups of this layout say; ``activations`` is one of the format's."""

    def config_files(self, model: QuantizedModel) -> ConfigFiles:
        """One group for each scheme."""
        arguments = self.group_args(activations_of(model, self.name, self.activations))
        return write_config(model, lambda scheme: arguments)


def write_config(model: QuantizedModel, arguments_of: Callable[[Scheme], GroupArgs]) -> ConfigFiles:
    """The config of a checkpoint, one group for each scheme; ``arguments_of`` knows which layout each is in."""
    coverage = cover(model)
    groups: dict[str, dict[str, Any]] = {}
    for number, (scheme, targets) in enumerate(target_lists(coverage).items()):
        layout, weights, inputs = arguments_of(scheme)
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": weights(scheme),
            "input_activations": inputs(scheme),
            "output_activations": None,
            "format": layout,
        }
    layouts = {group["format"] for group in groups.values()}
    return ConfigFiles(
        {
            "quant_method": "compressed-tensors",
            "version": DIALECT,
            "format": layouts.pop() if len(layouts) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ignore_list(coverage),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
        }
    )


def read_config(
    config: Mapping[str, Any],
    specs: SpecMap,
    layout: str,
    stored: list[str],
    scheme_of: Callable[[WeightArgs], Scheme],
) -> dict[str, Scheme]:
    """Module -> scheme of what is in this layout; ``stored`` are the modules that own its tensors."""
    for key in ("sparsity_config", "transform_config"):
        value = config.get(key)
        if value and not (key == "sparsity_config" and isinstance(value, Mapping) and value.get("format") == "dense"):
            raise ConfigError(f"{TOP}.{key}: sparse or transformed weights cannot be read, found {value!r}")
    groups = read_groups(config, layout, scheme_of)
    ignore = Matcher(strings(config, "ignore"))

    def scheme_for(module: str) -> Scheme | None:
        if ignore.matches(module):
            return None
        by_name = [scheme for targets, scheme in groups if targets.matches(module)]
        if by_name:
            return by_name[0]
        return next((scheme for targets, scheme in groups if targets.takes_all_linears), None)

    own = [module for module in stored if scheme_for(module) is not ELSEWHERE]
    return schemes_of(own, specs, scheme_for, scale_name="weight_scale", unquantized_key="ignore or config_groups")


def read_groups(
    config: Mapping[str, Any], layout: str, scheme_of: Callable[[WeightArgs], Scheme]
) -> list[tuple[Matcher, Scheme]]:
    """Targets and scheme of each group, ``ELSEWHERE`` for another layout's.

    ConfigError, which names the key, for what cannot be read.
    """
    found = []
    general, is_mixed = config.get("format"), len(_layouts(config)) > 1
    for name, group in section(config, "config_groups").items():
        path = f"{TOP}.config_groups.{name}"
        if not isinstance(group, Mapping):
            raise ConfigError(f"{path}: expected a mapping, found {group!r}")
        only_keys(group, _GROUP_KEYS, path)
        targets = Matcher(strings(group, "targets", path))
        said = layout_of_group(group, config)
        if said != layout:
            if not is_mixed:
                where = f"{path}.format" if group.get("format") else f"{TOP}.format"
                raise ConfigError(f"{where}: found {group.get('format') or general!r}, expected {layout!r}")
            found.append((targets, ELSEWHERE))
            continue
        weights = section(group, "weights", path)
        only_keys(weights, _ARGS_KEYS, f"{path}.weights")
        if weights.get("dynamic"):
            raise ConfigError(f"{path}.weights.dynamic: weights quantized while running are not in the file")
        # "group" and "dynamic" once reordered columns behind a weight_g_idx; no current reader takes it.
        if weights.get("actorder") in ("group", "dynamic", True):
            raise ConfigError(f"{path}.weights.actorder: found {weights['actorder']!r}, can read 'weight' or 'static'")
        found.append((targets, scheme_of(WeightArgs(weights, f"{path}.weights"))))
    if not found:
        raise ConfigError(f"{TOP}.config_groups: has no group")
    return found


def check_zero_points(schemes: Mapping[str, Scheme], specs: SpecMap) -> None:
    """ConfigError where a module has zero points though its scheme is symmetric, or none though it is not."""
    for module, scheme in schemes.items():
        if (f"{module}.weight_zero_point" in specs) is scheme.symmetric:
            found = "but the checkpoint has" if scheme.symmetric else "but the checkpoint lacks"
            raise ConfigError(
                f"{TOP}.config_groups: {module} is {'' if scheme.symmetric else 'not '}symmetric, {found} "
                f"{module}.weight_zero_point"
            )
