"""Does the config describe the bytes? From headers alone: every module against its claim, every entry against names."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from tensorsurgeon.checkpoint.folder import RECORD_NAME, Checkpoint
from tensorsurgeon.checkpoint.small_files import MAX_CONFIG_BYTES, parse_json, read_small
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.errors import did_you_mean
from tensorsurgeon.models.describe import describe_model
from tensorsurgeon.models.experts import stacked_experts
from tensorsurgeon.models.patterns import spellings
from tensorsurgeon.models.roles import WITHOUT_CONFIG, Role
from tensorsurgeon.tensors.names import natural_key
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec
from tensorsurgeon.verifying.claims import Claim, Claims, names_of
from tensorsurgeon.verifying.dialects import quantization_of
from tensorsurgeon.verifying.findings import Findings
from tensorsurgeon.verifying.layouts import main_of, parts_of, weight_shape
from tensorsurgeon.verifying.parts import MARKERS, describe_stored, is_stored_quantized
from tensorsurgeon.verifying.side_files import QUANTIZATION_FILES
from tensorsurgeon.verifying.weights import groups_of


class Module(NamedTuple):
    """A quantized module whose tensors are those of its claim."""

    name: str
    claim: Claim
    shape: tuple[int, int]
    tensors: Mapping[str, TensorSpec]


class Described(NamedTuple):
    """What was found: sound quantized modules, and every module that is stored quantized, sound or not."""

    modules: dict[str, Module]
    stored: Mapping[str, Mapping[str, TensorSpec]]


def tensors_by_module(specs: SpecMap) -> dict[str, dict[str, TensorSpec]]:
    """Module -> local name -> spec; a tensor without a dot is a module of its own."""
    modules: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, spec in specs.items():
        module, _, local = name.rpartition(".")
        modules[module][local] = spec
    return modules


def check_described(reader: TensorReader, claims: Claims | None, findings: Findings, *, known_method: bool) -> Described:
    """Compare config and tensors; ``known_method`` is false where the config is of a method nobody here reads."""
    specs = reader.specs
    by_module = tensors_by_module(specs)
    stored = {name: tensors for name, tensors in by_module.items() if is_stored_quantized(tensors)}
    _check_raw_names(specs, findings)
    if not known_method:
        return Described({}, stored)
    sound: dict[str, Module] = {}
    model = describe_model(specs)
    for name, tensors in stored.items():
        claim = claims.of(name) if claims is not None else None
        if model.module_use(name).kind in WITHOUT_CONFIG:
            _fault_router(name, tensors, findings)
        if claim is None:
            _fault_unclaimed(name, tensors, claims, findings)
            continue
        found = _check_module(reader, name, tensors, claim, findings)
        if found is not None:
            sound[name] = found
    if claims is not None:
        _check_unquantized(specs, claims, stored, findings)
        check_entries(reader.checkpoint, claims, list(by_module), findings)
    return Described(sound, stored)


def _fault_router(name: str, tensors: Mapping[str, TensorSpec], findings: Findings) -> None:
    findings.fault(
        Role.ROUTER.value,
        name,
        f"is stored quantized ({describe_stored(tensors)}), but engines hand routers and gates no quantization config; "
        "keep it in float",
    )


def _fault_unclaimed(name: str, tensors: Mapping[str, TensorSpec], claims: Claims | None, findings: Findings) -> None:
    shown = describe_stored(tensors)
    if claims is None:
        findings.fault("not-in-config", name, f"is stored quantized ({shown}), but config.json has no quantization_config")
    elif "embed" in name.rpartition(".")[2]:
        findings.note(
            "quantized-embedding", name,
            f"is stored quantized ({shown}), and most readers look for embeddings in float only",
        )  # fmt: skip
    else:
        findings.fault(
            "not-in-config",
            name,
            f"is stored quantized ({shown}), but {claims.kept_out_by} or the scope of the config keeps it out",
        )


def _check_module(
    reader: TensorReader, name: str, tensors: Mapping[str, TensorSpec], claim: Claim, findings: Findings
) -> Module | None:
    """The module if every tensor of its claim is there with the right dtype and shape, and no other is."""
    main = tensors.get(main_of(claim))
    if main is None or (claim.layout == "plain" and main.dtype.is_float and main.dtype.bits >= 16):
        found = describe_stored(tensors)
        findings.fault(
            "missing-tensor",
            f"{name}.{main_of(claim)}",
            f"the config says {claim.describe()} in {claim.layout} layout, but the module has {found}",
        )
        return None
    stored_shape = None
    shape_spec = tensors.get("weight_shape")
    if claim.layout == "ct-packed" and shape_spec is not None and shape_spec.numel == 2 and not shape_spec.dtype.is_float:
        first, second = (int(v) for v in reader.array(f"{name}.weight_shape").reshape(-1))
        stored_shape = (first, second)
    shape = weight_shape(main, claim, stored_shape)
    if shape is None or 0 in shape:
        findings.fault("shape", main.name, f"{main.dtype.name}{list(main.shape)} is no weight of {claim.describe()}")
        return None
    sound = True
    if stored_shape is not None and stored_shape != shape:
        findings.fault(
            "weight-shape",
            f"{name}.weight_shape",
            f"says {list(stored_shape)}, but {main.name} {main.dtype.name}{list(main.shape)} "
            f"holds {list(shape)} at {claim.num_bits} bits",
        )
        sound = False
    if claim.group_size > 0 and shape[1] % claim.group_size:
        findings.fault(
            "group-size",
            name,
            f"group_size {claim.group_size} of the config does not divide the {shape[1]} inputs of this weight",
        )
        return None
    parts = parts_of(claim, shape)
    for part in parts:
        spec = tensors.get(part.local)
        if spec is None:
            if part.required:
                findings.fault(
                    "missing-tensor",
                    f"{name}.{part.local}",
                    f"is missing; a weight {list(shape)} of {claim.describe()} needs it as {part.describe()}",
                )
                sound = False
            continue
        if spec.dtype not in part.dtypes:
            findings.fault("dtype", spec.name, f"is {spec.dtype.name}, expected {part.describe()} for {claim.describe()}")
            sound = False
        if spec.shape not in part.shapes:
            findings.fault(
                "shape",
                spec.name,
                f"is {list(spec.shape)}, expected {part.describe()} for a weight {list(shape)} of "
                f"{claim.describe()}{_why(claim, part.local, spec, shape)}",
            )
            sound = False
    known = {part.local for part in parts}
    for local, spec in tensors.items():
        if local not in known and (local in MARKERS or (local == "weight" and main_of(claim) != "weight")):
            findings.fault(
                "extra-tensor",
                spec.name,
                f"{spec.dtype.name}{list(spec.shape)} is no tensor of {claim.describe()} in {claim.layout} layout",
            )
            sound = False
    return Module(name, claim, shape, tensors) if sound else None


def _why(claim: Claim, local: str, spec: TensorSpec, shape: tuple[int, int]) -> str:
    """What a wrong shape probably means."""
    rows, columns = shape
    if local == claim.scale_name and claim.vector_scale and spec.shape == (rows, 1):
        return "; vLLM's experts cannot take the trailing axis (surgeon's quark-export-rename removes it)"
    if local == claim.scale_name and len(spec.shape) == 2:
        groups = spec.shape[0] if claim.layout in ("gptq", "awq") else spec.shape[1]
        if groups > 1 and groups != groups_of(claim, columns) and columns % groups == 0:
            return f"; these are groups of {columns // groups}"
    return ""


def _check_raw_names(specs: SpecMap, findings: Findings) -> None:
    for name in specs:
        if name.endswith(("_quantizer.scale", "_quantizer.zero_point")) or "_quantizer.0." in name:
            findings.fault("raw-name", name, "is a key of a raw Quark export, which no engine knows; apply quark-export-rename")


def _check_unquantized(specs: SpecMap, claims: Claims, stored: Mapping[str, Any], findings: Findings) -> None:
    for module in float_linears(specs):
        if module not in stored:
            claim = claims.of(module)
            if claim is not None:
                spec = specs[f"{module}.weight"]
                findings.fault(
                    "not-quantized",
                    module,
                    f"the config says {claim.describe()}, but it is stored as {spec.dtype.name}{list(spec.shape)} and "
                    f"{claims.kept_out_by} does not keep it out",
                )
    for prefix, spec in float_stacks(specs).items():
        claim = claims.of(f"{prefix}.0.gate_proj")
        if claim is not None:
            findings.fault(
                "not-quantized",
                spec.name,
                f"the config says that experts are {claim.describe()}, but they are stacked as "
                f"{spec.dtype.name}{list(spec.shape)} and {claims.kept_out_by} does not keep them out",
            )


def float_linears(specs: SpecMap) -> list[str]:
    """Modules with an unquantized matrix that some reader may take for a quantized linear, the head among them."""
    model = describe_model(specs)
    return [module for module in model.linears() if model.use(f"{module}.weight").kind not in WITHOUT_CONFIG]


def float_stacks(specs: SpecMap) -> dict[str, TensorSpec]:
    """``x.mlp.experts`` -> one of its 3-D float tensors."""
    return stacked_experts(spec for spec in specs.values() if spec.dtype.is_float and spec.dtype.bits >= 16)


def check_entries(checkpoint: Checkpoint, claims: Claims, modules: list[str], findings: Findings) -> None:
    """An entry that names nothing is a misspelt one. Expressions are often written for many models: a note, unless
    this program wrote the config, which never writes an idle one."""
    names = names_of(modules, float_stacks(checkpoint.specs))
    own = (checkpoint.root / RECORD_NAME).exists()
    for entry in claims.entries:
        if entry.how == "exact" and not names.isdisjoint((entry.text, *spellings(entry.text))):
            continue
        if entry.how != "exact" and any(entry.matches(n) for name in names for n in (name, *spellings(name))):
            continue
        where = f"config.json quantization_config.{entry.key}"
        near = sorted((m for m in names if m.count(".") == entry.text.count(".")), key=natural_key)
        if entry.is_expression and not own:
            findings.note("idle-entry", where, f"{entry.text!r} matches no module")
        else:
            hint = did_you_mean(entry.text, near) if len(near) < 5000 else ""
            findings.fault("idle-entry", where, f"{entry.text!r} matches no module{hint if 'did you mean' in hint else ''}")


def check_config_copies(checkpoint: Checkpoint, findings: Findings) -> None:
    """Files that repeat the quantization_config must repeat it exactly: readers take whichever they find first."""
    # As it stands there: a checkpoint that was opened has in its config what only a file beside it says.
    config = quantization_of(json.loads(checkpoint.config_text or b"{}"))
    for name in QUANTIZATION_FILES[:2]:
        path = checkpoint.root / name
        if name not in checkpoint.side_files:
            continue
        try:
            copy = parse_json(read_small(path, MAX_CONFIG_BYTES)[0])
        except (OSError, ValueError) as error:
            findings.fault("config-copy", name, f"is not valid JSON: {error}")
            continue
        if config is None:
            findings.fault("config-copy", name, "describes a quantization, but config.json has no quantization_config")
        elif not isinstance(copy, Mapping) or not isinstance(config, Mapping):
            findings.fault(
                "config-copy", name, "is not the quantization_config of config.json, which should be a mapping in both"
            )
        elif copy != config:
            keys = sorted(k for k in {*copy, *config} if copy.get(k) != config.get(k))
            shown = ", ".join(f"{k} ({copy.get(k)!r} here, {config.get(k)!r} there)" for k in keys[:3])
            findings.fault("config-copy", name, f"differs from the quantization_config of config.json in {shown}")
