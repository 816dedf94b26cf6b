"""How engines hold linears: parts stacked into one, and cut among the ranks of tensor parallelism.

vLLM and SGLang agree here (both follow Megatron): what makes features is cut along its outputs, what brings them back
together along its inputs, and the heads of keys and values are repeated where there are fewer of them than ranks.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from tensorsurgeon.models.cuts import Cut, cut_of
from tensorsurgeon.models.roles import Role
from tensorsurgeon.quant.scheme import Scheme

_KEYS_AND_VALUES: Final = {"k_proj", "v_proj"}


class Heads(NamedTuple):
    """Head counts and sizes from the model's config, 0 where it names none.

    ``linear_keys``, ``linear_values``: features of all keys and of all values in a linear-attention layer.
    """

    attention: int = 0
    key_values: int = 0
    linear_values_count: int = 0
    linear_keys: int = 0
    linear_values: int = 0


class Linear(NamedTuple):
    """A linear as an engine holds it, standing for all of the same form.

    ``subject``: the name with numbers masked. ``leaf``: the last part of the fused name. ``parts``: leaf and
    out_features of each stored part, in the order in which they are stacked. ``number``: how many there are. ``kind``:
    what it is for, within its part of the model.
    """

    subject: str
    leaf: str
    parts: tuple[tuple[str, int], ...]
    in_features: int
    scheme: Scheme
    number: int
    is_mtp: bool
    kind: Role | None = None

    @property
    def cut(self) -> Cut:
        return cut_of(self.parts[0][0])

    def inputs(self, tp: int) -> int:
        """Inputs that one of ``tp`` ranks holds."""
        return self.in_features // tp if self.cut == "inputs" else self.in_features

    def outputs(self, tp: int, heads: Heads) -> tuple[int, ...]:
        """Outputs of each part on one of ``tp`` ranks."""
        sizes: list[int] = []
        for leaf, rows in self.parts:
            if self.cut != "outputs":
                sizes.append(rows)
            elif leaf in _KEYS_AND_VALUES and 0 < heads.key_values < tp:
                sizes.append(rows // heads.key_values)
            elif leaf == "in_proj_qkv" and rows == 2 * heads.linear_keys + heads.linear_values:
                sizes += [heads.linear_keys // tp, heads.linear_keys // tp, heads.linear_values // tp]
            elif leaf in ("qkv", "qkv_proj"):
                sizes += _heads_of(rows, tp, heads)
            elif leaf == "gate_up_proj":
                sizes += [rows // 2 // tp] * 2
            else:
                sizes.append(rows // tp)
        return tuple(sizes)

    def uneven(self, tp: int, heads: Heads) -> str | None:
        """What ``tp`` ranks cannot share evenly, in words; None if they can."""
        if self.cut == "inputs" and self.in_features % tp:
            return f"in_features {self.in_features}"
        if self.cut == "outputs" and self.leaf != "lm_head":
            for leaf, rows in self.parts:
                repeated = leaf in _KEYS_AND_VALUES and 0 < heads.key_values < tp
                if not repeated and rows % tp:
                    return f"out_features {rows} of {leaf}"
        return None


def _heads_of(rows: int, tp: int, heads: Heads) -> list[int]:
    """Outputs of queries, keys and values on a rank where they are stored as one; thirds where the config names no heads."""
    units = heads.attention + 2 * heads.key_values
    if not heads.key_values or rows % units:
        return [rows // 3 // tp] * 3
    each = rows // units
    shared = each * heads.key_values // tp if heads.key_values >= tp else each
    return [each * heads.attention // tp, shared, shared]


class Experts(NamedTuple):
    """The quantized experts of all layers of one form, which an engine runs as one kernel per layer.

    ``leaves``: out_features, in_features and scheme of each stored linear, by leaf. ``mixed``: what differs within a
    layer, in words, or is missing; None if nothing.
    """

    subject: str
    leaves: dict[str, tuple[int, int, Scheme]]
    layers: int
    mixed: str | None
    is_mtp: bool

    @property
    def scheme(self) -> Scheme:
        return next(iter(self.leaves.values()))[2]

    @property
    def hidden(self) -> int:
        """Features that go in and come out."""
        return next((k for leaf, (_, k, _) in self.leaves.items() if cut_of(leaf) == "outputs"), 0) or next(
            n for n, _, _ in self.leaves.values()
        )

    @property
    def intermediate(self) -> int:
        """Features between an expert's two stages, which ranks share."""
        return next((k for leaf, (_, k, _) in self.leaves.items() if cut_of(leaf) == "inputs"), 0) or next(
            n for n, _, _ in self.leaves.values()
        )
