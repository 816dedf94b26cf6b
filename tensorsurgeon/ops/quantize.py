"""Quantize linears: numbers by a backend, names and packing by a format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from tensorsurgeon.errors import NumericError, RecipeError, SpecError, did_you_mean
from tensorsurgeon.formats.base import Format
from tensorsurgeon.formats.coding import Written, written_by
from tensorsurgeon.formats.registry import format_named
from tensorsurgeon.models.selecting import refuse_stacked_experts, selected_linears
from tensorsurgeon.ops.assembled import Assembled
from tensorsurgeon.ops.fields import typed_fields
from tensorsurgeon.ops.row_blocks import CHUNK_ROWS, chunk_rows, codes_scratch, is_large, stored_specs, written_rows
from tensorsurgeon.ops.siblings import sibling_groups
from tensorsurgeon.ops.stored_modules import model_dtype, stated_dtype
from tensorsurgeon.planning.rewriting import Array, Rewrite
from tensorsurgeon.quant.rtn.backend import choose_backend
from tensorsurgeon.quant.scheme import RULES, Quantized, Rule, Scheme
from tensorsurgeon.tensors.arrays import for_a_while
from tensorsurgeon.tensors.dtypes import DTYPES, F32, WEIGHT_DTYPES, DType, dtype_named
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec

# What torch holds for each element while it rounds, and while it searches for clipped ranges.
_TORCH_BYTES = 32


class _Form(NamedTuple):
    """What is written for each weight of one dtype and shape: the tensors by local name, and whether in blocks of rows."""

    written: Written
    tensors: tuple[TensorSpec, ...]
    goes_by_rows: bool


@dataclass(frozen=True, kw_only=True)
@typed_fields
class Quantize:
    """Quantize every weight that ``where`` selects and ``exclude`` does not, and write it in ``format``.

    A role in ``where`` (``role:attention``) means the weights of its linears; a matrix whose role is not known then
    stops the plan, unless a pattern names it.
    Whatever is not given (``num_bits``, ``group_size``, ``symmetric``, ``rule``) is the format's default. ``rule``
    names the tool whose scales and rounding are matched to the bit. ``signed`` scales make the extreme value of each group the
    lowest code of a symmetric integer grid, whatever its sign (``Scheme.signed``): as the rule has it for ``rtn``, and what
    other methods start from unless the format's engines speak against it. ``activations`` is what the config tells the
    engine to do with inputs. Methods other than ``rtn`` need calibration.
    """

    where: tuple[str, ...]
    format: str
    exclude: tuple[str, ...] = ()
    method: Literal["rtn", "imatrix", "gptq", "signround"] = "rtn"
    num_bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    rule: Rule | None = None
    signed: bool | None = None
    scale_dtype: str | None = None
    block: tuple[int, ...] | None = None
    clip_search: bool = False
    activations: str | None = None
    # Which backend makes the numbers changes no bit of them, so it is no part of the recipe's identity.
    backend: str = field(default="auto", repr=False, metadata={"recipe": False})

    def __post_init__(self) -> None:
        if self.num_bits is not None and not 2 <= self.num_bits <= 8:
            raise RecipeError(f"quantize: num_bits must be 2 to 8, found {self.num_bits}")
        if self.group_size is not None and self.group_size != -1 and self.group_size < 1:
            raise RecipeError(f"quantize: group_size must be positive, or -1 for one group per row, found {self.group_size}")
        if self.block is not None and (len(self.block) != 2 or min(self.block) < 1):
            raise RecipeError(f"quantize: block must be two positive sizes, rows and columns, found {list(self.block)}")
        if self.scale_dtype is not None and self.scale_dtype not in DTYPES:
            raise RecipeError(f"quantize: unknown scale_dtype {self.scale_dtype!r}{did_you_mean(self.scale_dtype, list(DTYPES))}")
        if self.rule is not None and self.rule not in RULES:
            raise RecipeError(f"quantize: unknown rule {self.rule!r}; known: {', '.join(RULES)}")

    reads_floats: ClassVar[bool] = True

    @cached_property
    def layout(self) -> Format:
        return format_named(self.format)

    @cached_property
    def scheme(self) -> Scheme:
        """The format's default scheme with what this step says on top; how scales are stored depends on the weight."""
        given: dict[str, Any] = {
            "num_bits": self.num_bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "rule": self.rule,
            "signed": self.signed,
            "scale_dtype": None if self.scale_dtype is None else dtype_named(self.scale_dtype),
            "block": self.block,
            "clip_search": self.clip_search or None,
        }
        scheme = replace(self.layout.default_scheme(), **{k: v for k, v in given.items() if v is not None})
        is_symmetric_int = scheme.type == "int" and scheme.symmetric
        if self.signed and not is_symmetric_int:
            kind = f"{scheme.type} codes" if scheme.type != "int" else "codes with zero points"
            raise RecipeError(f"quantize: signed scales are those of symmetric integer codes; {self.format} writes {kind} here")
        if self.method == "signround" and scheme.type != "int":
            raise RecipeError(
                f"quantize: method signround tunes integer codes, and {self.format} writes {scheme.type} codes, which have rtn, "
                "imatrix and gptq"
            )
        if self.method != "rtn" and self.signed is None and is_symmetric_int and not self.layout.unsigned_because:
            return replace(scheme, signed=True)
        return scheme

    def calibrated(self) -> Quantize:
        """This step with codes that calibration chooses, by GPTQ unless another method is named."""
        return self if self.method != "rtn" else replace(self, method="gptq")

    def plan(self, specs: SpecMap) -> tuple[Rewrite, ...]:
        chosen = selected_linears(specs, self.where, self.exclude)
        refuse_stacked_experts(specs, self.where, self.exclude)
        # A model has few forms of weights and many weights.
        ways: dict[DType, Written] = {}
        forms: dict[tuple[DType, tuple[int, ...]], _Form] = {}
        rewrites: list[Rewrite] = []
        # The parts of a module that engines fuse share one global scale where the grid has one.
        groups = sibling_groups(specs, chosen) if self.scheme.type == "nvfp4" else ((name,) for name in chosen)
        for group in groups:
            weights = [specs[name] for name in group]
            outputs: list[TensorSpec] = []
            for weight in weights:
                name, dtype, shape = weight
                if (dtype, shape) not in forms:
                    if dtype not in ways:
                        ways[dtype] = self._written(weight, specs)
                    forms[dtype, shape] = self._form(weight, ways[dtype])
                form = forms[dtype, shape]
                prefix = name.removesuffix("weight")
                outputs += [TensorSpec(prefix + local, stored, size) for local, stored, size in form.tensors]
            form = forms[weights[0][1:]]
            if form.goes_by_rows and len(group) == 1:
                rewrites.extend(_chunks(weights[0], outputs, form.written))
            else:
                rewrites.append(Rewrite(tuple(map(Region, weights)), tuple(map(Region, outputs)), False, form.written))
        return tuple(rewrites)

    def _written(self, weight: TensorSpec, specs: SpecMap) -> Written:
        """How weights of this dtype are written; SpecError where it is no float."""
        if weight.dtype not in WEIGHT_DTYPES:
            hint = "; dequantize it first" if not weight.dtype.is_float or weight.dtype.bits < 16 else ""
            raise SpecError(f"{weight.name}: cannot quantize {weight.dtype.name}; BF16, F16 or F32 is needed{hint}")
        # F32 weights come out of a quantized source, on the way or in a run before, and say nothing of the model's own dtype,
        # in which scales are stored that have no dtype of the format's; both ways give the same bytes.
        own = weight.dtype
        if own is F32:
            own = stated_dtype(specs) or (F32 if specs.unpacked is None else model_dtype(specs))
        scheme = self.layout.resolve_scheme(self.scheme, own)
        return Written(self.layout, scheme, self.activations, self.method, self.where, self.exclude)

    def _form(self, weight: TensorSpec, written: Written) -> _Form:
        """What is written for weights of this dtype and shape; SpecError if they cannot be quantized."""
        scheme = written.scheme
        if len(weight.shape) != 2:
            raise SpecError(
                f"{weight.name}: cannot quantize a tensor of shape {list(weight.shape)}; a linear weight [out, in] is "
                "needed. Exclude it, or split stacked experts first"
            )
        self.layout.check(weight, scheme)
        # A rule that no backend knows is told now, not after an hour.
        choose_backend(self.backend, replace(scheme, clip_search=False), weight.dtype)
        return _Form(written, self.layout.tensors(weight, scheme), is_large(weight) and self.layout.can_chunk_rows(scheme))

    def scratch_bytes(self, rewrite: Rewrite) -> int:
        """The codes, a byte each, where they are packed, and scales in F32; what torch holds where it computes."""
        elements = sum(prod(region.shape) for region in rewrite.inputs)
        in_torch = self.clip_search or self.backend == "torch"
        each = codes_scratch(elements, stored_specs(rewrite.outputs), 2)
        return each + (_TORCH_BYTES * elements if in_torch else 0)

    def apply(self, rewrite: Rewrite, inputs: Sequence[Array]) -> Sequence[Array]:
        """Codes by rounding to nearest, whatever the method: those of calibration come from the executor."""
        written = written_by(rewrite.detail)
        assert written is not None  # plan put it there
        scheme = written.scheme
        amax = largest_magnitude(inputs) if scheme.type == "nvfp4" else None
        results: list[Array] = []
        for region, weight in zip(rewrite.inputs, inputs, strict=True):
            try:
                results += written.format.pack(self._quantized(region, weight, scheme, amax), scheme)
            except NumericError as error:
                raise NumericError(f"{region}: {error.message}") from error
        return results

    def takes_rows(self, rewrite: Rewrite) -> bool:
        """Whether codes of some rows need no other rows, but for the largest magnitude that NVFP4 asks for first."""
        written = written_by(rewrite.detail)
        if written is None or self.clip_search or self.backend == "torch":
            return False
        scheme = written.scheme
        tall = scheme.block is not None and CHUNK_ROWS % scheme.block[0]
        return not tall and (scheme.group_size != 0 or scheme.block is not None)

    def apply_rows(self, rewrite: Rewrite, streams: Sequence[Callable[[], Iterable[Array]]]) -> Sequence[Array]:
        """``apply`` for weights that come some rows at a time, and again from the beginning when asked for again."""
        written = written_by(rewrite.detail)
        assert written is not None  # plan put it there
        scheme = written.scheme
        amax = None
        if scheme.type == "nvfp4":
            amax = max((largest_magnitude((block,)) for stream in streams for block in stream()), default=0.0)
        results: list[Array] = []
        for region, stream in zip(rewrite.inputs, streams, strict=True):
            try:
                results += written.format.pack(self._of_rows(region, stream(), scheme, amax), scheme)
            except NumericError as error:
                raise NumericError(f"{region}: {error.message}") from error
        return results

    def _of_rows(self, region: Region, blocks: Iterable[Array], scheme: Scheme, amax: float | None) -> Quantized:
        codes = Assembled(region.shape[0])
        for block in blocks:
            with for_a_while():
                codes.add(len(block), self._quantized(region, block, scheme, amax))
        return codes.whole()

    def _quantized(self, region: Region, weight: Array, scheme: Scheme, global_amax: float | None) -> Quantized:
        if scheme.clip_search:
            # The search runs in torch, which nothing else here needs.
            from tensorsurgeon.quant.rtn.clipping import quantize_searched

            plain = replace(scheme, clip_search=False)
            return quantize_searched(weight, scheme, choose_backend(self.backend, plain, region.spec.dtype))
        return choose_backend(self.backend, scheme, region.spec.dtype).quantize(weight, scheme, global_amax=global_amax)


def _chunks(weight: TensorSpec, outputs: Sequence[TensorSpec], written: Written) -> Iterator[Rewrite]:
    """A large weight row block by row block, where rows of the weight are rows of every output."""
    rows, step = weight.shape[0], chunk_rows(weight)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield Rewrite((Region(weight, start, stop),), written_rows(outputs, start, stop, rows), detail=written)


def largest_magnitude(weights: Sequence[Array]) -> float:
    """The largest absolute value over several weights: what a shared global scale is made from."""
    blocks = (weight[start : start + CHUNK_ROWS] for weight in weights for start in range(0, len(weight), CHUNK_ROWS))
    return max((float(np.abs(block.astype(np.float32)).max(initial=0.0)) for block in blocks), default=0.0)
