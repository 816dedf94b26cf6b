"""Each publisher's ``quantization_config``, read as the engines read it; wrong values become faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from tensorsurgeon.errors import did_you_mean
from tensorsurgeon.tensors.spec import SpecMap
from tensorsurgeon.verifying import coded_stacks
from tensorsurgeon.verifying.claims import TOP, Claims
from tensorsurgeon.verifying.dialects import compressed_tensors, fp8, gptq, quark
from tensorsurgeon.verifying.findings import Findings

Reader = Callable[[Mapping[str, Any], SpecMap, Findings], Claims | None]

DIALECTS: Final[dict[str, Reader]] = {
    "compressed-tensors": compressed_tensors.read,
    "quark": quark.read,
    "gptq": gptq.read_gptq,
    "auto-round": gptq.read_autoround,
    "intel/auto-round": gptq.read_autoround,
    "awq": gptq.read_awq,
    "fp8": fp8.read,
    "mxfp4": coded_stacks.read,
}
# Methods whose bytes this program does not know; engines do.
_FOREIGN: Final = (
    "bitsandbytes",
    "modelopt",
    "hqq",
    "aqlm",
    "quanto",
    "torchao",
    "eetq",
    "bitnet",
    "vptq",
    "exl2",
    "exl3",
)


def quantization_of(config: Mapping[str, Any]) -> Any:
    """The ``quantization_config`` of a model, which some tools put into ``text_config``; None if it has none."""
    found = config.get(TOP) or config.get("compression_config")
    text = config.get("text_config")
    return found or (text.get(TOP) if isinstance(text, Mapping) else None) or None


def read_claims(specs: SpecMap, findings: Findings) -> Claims | None:
    """What config.json says is quantized; None, and a fault or note, where it says nothing that can be read."""
    config = quantization_of(specs.config)
    if config is None:
        return None
    if not isinstance(config, Mapping):
        findings.fault("config", f"config.json {TOP}", f"expected a mapping, found {config!r}")
        return None
    method = config.get("quant_method")
    reader = DIALECTS.get(method) if isinstance(method, str) else None
    if reader is not None:
        return reader(config, specs, findings)
    if method in _FOREIGN:
        findings.note(
            "unknown-method",
            f"config.json {TOP}.quant_method",
            f"{method}: its tensors were not checked, for their layout is not known here",
        )
    else:
        findings.fault(
            "config", f"config.json {TOP}.quant_method", f"no reader knows {method!r}{did_you_mean(str(method), list(DIALECTS))}"
        )
    return None
