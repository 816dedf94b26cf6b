"""Byte moves vanish into pieces of the source: whatever chain of ops, the pieces must say what NumPy says."""

from __future__ import annotations

import random

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorsurgeon.errors import NameCollisionError, PlanError, SpecError
from tensorsurgeon.ops.cast import Cast
from tensorsurgeon.ops.concat import Concat
from tensorsurgeon.ops.drop import Drop
from tensorsurgeon.ops.rename import Rename
from tensorsurgeon.ops.reshape import Reshape
from tensorsurgeon.ops.split import Split
from tensorsurgeon.ops.squeeze import Squeeze
from tensorsurgeon.ops.stack import Stack
from tensorsurgeon.ops.transpose import Transpose
from tensorsurgeon.ops.unsqueeze import Unsqueeze
from tensorsurgeon.ops.unstack import Unstack
from tensorsurgeon.planning.resolving import Piece, resolve, units_of
from tensorsurgeon.planning.rewriting import Rewrite, advance
from tensorsurgeon.tensors.dtypes import F4, F32, U8
from tensorsurgeon.tensors.spec import Region, SpecMap, TensorSpec
from tests.checkpoints import Tensors, assert_same
from tests.contract.ops import spec_map

# --- the interpreter: the same ops, said in NumPy, on whole arrays -----------------------------------------------


def interpret(op, tensors: Tensors, name: str) -> Tensors:
    """What ``op``, which was drawn for the tensor ``name``, does to all tensors."""
    out = dict(tensors)
    array = out.pop(name)
    match op:
        case Rename():
            out[op.to] = array
        case Split():
            cuts = np.cumsum(op.sizes)[:-1]
            out |= dict(zip(op.into, np.split(array, cuts, axis=op.axis), strict=True))
        case Reshape():
            out[name] = array.reshape(op.shape)
        case Squeeze():
            out[name] = np.squeeze(array, op.axis)
        case Unsqueeze():
            out[name] = np.expand_dims(array, op.axis)
        case Unstack():
            out |= {op.into[0].replace("{index}", str(i)): part for i, part in enumerate(array)}
        case Transpose():
            out[name] = array.swapaxes(-1, -2)
        case Cast():
            out[name] = array.astype(np.float32)
        case Drop():
            pass
        case Concat():
            out = {k: v for k, v in tensors.items() if k not in op.parts}
            out[op.into] = np.concatenate([tensors[p] for p in op.parts], axis=op.axis)
        case Stack():
            prefix = op.where[0].removesuffix("{index}")
            parts = {k: v for k, v in tensors.items() if k.startswith(prefix)}
            out = {k: v for k, v in tensors.items() if k not in parts}
            out[op.into] = np.stack([parts[f"{prefix}{i}"] for i in range(len(parts))])
    return out


def random_chain(seed: int, length: int):
    """A few tensors and a chain of ops that fit them; every op names one tensor, or a family it made itself.

    Drawn from a seed, for a search that prefers small choices would hardly ever join what it cut.
    """
    pick = random.Random(seed)
    rng = np.random.default_rng(seed)
    dtype = pick.choice([np.int8, np.uint16, ml_dtypes.bfloat16, np.float32])
    sizes = [1, 2, 2, 3, 4] if seed % 5 else [0, 1, 2]
    start = {
        f"t{i}": rng.integers(0, 100, [pick.choice(sizes) for _ in range(pick.choice([0, 1, 2, 2, 3, 3]))]).astype(dtype)
        for i in range(3)
    }
    tensors, ops = dict(start), []
    for number in range(length):
        name = pick.choice(sorted(tensors))
        array = tensors[name]
        new = f"n{number}"
        axis = pick.randrange(max(array.ndim, 1))
        partners = [
            k for k, a in tensors.items() if k != name and array.ndim and (a.shape, a.dtype) == (array.shape, array.dtype)
        ]
        family = name.rpartition(".")[0] + "."
        parts = {k.removeprefix(family): a for k, a in tensors.items() if k.startswith(family)}
        alike = len({(a.shape, a.dtype) for a in parts.values()}) == 1 and parts.keys() == {str(i) for i in range(len(parts))}
        choices = [Rename(where=(name,), to=new), Unsqueeze(where=(name,), axis=pick.randint(0, array.ndim))]
        choices += [
            Reshape(
                where=(name,),
                shape=pick.choice([(array.size,), (1, array.size), (array.size, 1), (*array.shape, 1), array.shape[::-1]]),
            )
        ]
        if array.ndim:
            first = pick.randint(0, array.shape[axis])
            choices += [
                Split(where=(name,), into=(f"{new}.0", f"{new}.1"), axis=axis, sizes=(first, array.shape[axis] - first))
            ] * 2
            if array.shape[axis] % 2 == 0:
                choices += [
                    Split(where=(name,), into=(f"{new}.0", f"{new}.1"), axis=axis, sizes=(array.shape[axis] // 2,) * 2)
                ] * 3
        if array.ndim > 1 and array.shape[0]:
            choices += [Unstack(where=(name,), into=(new + ".{index}",))] * 3
        if array.ndim > 1:
            choices += [Transpose(where=(name,))]
        if 1 in array.shape:
            choices += [Squeeze(where=(name,), axis=array.shape.index(1))]
        if array.dtype != np.float32:
            choices += [Cast(where=(name,), dtype="F32")]
        if len(tensors) > 4:
            choices += [Drop(where=(name,))]
        if partners:
            choices += [Concat(parts=(name, pick.choice(partners)), into=new, axis=axis)] * 8
        if family != "." and alike and array.ndim:
            choices += [Stack(where=(family + "{index}",), into=new)] * 6
        ops.append(pick.choice(choices))
        tensors = interpret(ops[-1], tensors, name)
    return start, ops, tensors


seeds, lengths = st.integers(0, 1 << 32), st.integers(1, 12)


def carry_out(ops, start: Tensors) -> Tensors:
    """Resolve, run every task on the bytes of its pieces, and put the final pieces together."""
    resolved = resolve(ops, spec_map(start))
    origins = [np.ascontiguousarray(a).tobytes() for a in start.values()]
    made: dict[int, bytes] = {}

    def gather(pieces) -> bytes:
        for origin, begin, nbytes in pieces:
            assert nbytes > 0
            assert begin + nbytes <= len(origins[origin] if origin >= 0 else made[origin])
        return b"".join((origins[o] if o >= 0 else made[o])[b : b + n] for o, b, n in pieces)

    for unit in units_of(resolved.tasks, resolved.made):
        for number in unit:
            task = resolved.tasks[number]
            inputs = [
                np.frombuffer(gather(pieces), region.spec.dtype.numpy).reshape(region.shape)
                for region, pieces in zip(task.rewrite.inputs, task.inputs, strict=True)
            ]
            for origin, array in zip(task.outputs, ops[task.step].apply(task.rewrite, inputs), strict=True):
                made[origin] = np.ascontiguousarray(array).tobytes()
    return {
        name: np.frombuffer(gather(resolved.contents[name]), spec.dtype.numpy).reshape(spec.shape)
        for name, spec in resolved.specs.items()
    }


@settings(max_examples=400)
@given(seeds, lengths)
def test_any_chain_of_ops_gives_the_bytes_that_numpy_gives(seed, length):
    start, ops, wanted = random_chain(seed, length)
    assert_same(carry_out(ops, start), wanted)


def test_splitting_and_fusing_again_is_one_piece_of_the_source():
    start = {"e.gate_up": np.zeros((64, 8, 4), np.float32)}
    ops = [
        Split(where=("e.gate_up",), into=("e.gate", "e.up"), axis=1),
        Unstack(where=("e.gate",), into=("e.{index}.gate",)),
        Unstack(where=("e.up",), into=("e.{index}.up",)),
        Concat(parts=("e.{i}.gate", "e.{i}.up"), into="e.{i}.gate_up"),
        Stack(where=("e.{index}.gate_up",), into="e.gate_up"),
    ]
    resolved = resolve(ops, spec_map(start))
    assert resolved.contents == {"e.gate_up": (Piece(0, 0, 64 * 8 * 4 * 4),)}
    assert resolved.tasks == []


def test_tasks_that_feed_each_other_are_one_unit_and_others_are_not():
    start = {n: np.zeros((2, 3), np.float32) for n in "abc"}
    ops = [
        Transpose(where=("{x}",)),
        Concat(parts=("a", "b"), into="ab"),
        Transpose(where=("ab",)),
    ]
    resolved = resolve(ops, spec_map(start))
    names = [{resolved.tasks[n].rewrite.inputs[0].spec.name for n in unit} for unit in units_of(resolved.tasks, resolved.made)]
    assert names == [{"a", "b", "ab"}, {"c"}]


# --- what a step may not say -------------------------------------------------------------------------------------


class Says:
    """A transform that plans what it is told."""

    def __init__(self, *rewrites: Rewrite) -> None:
        self.rewrites = rewrites

    def plan(self, specs):
        return self.rewrites

    def apply(self, rewrite, inputs):
        raise AssertionError("these plans are refused")


A = TensorSpec("a", F32, (4, 2))
B = TensorSpec("b", F32, (4, 2))
PACKED = TensorSpec("p", F4, (4, 3))


@pytest.mark.parametrize(
    ("rewrites", "error", "message"),
    [
        ([Rewrite((Region(A),), (Region(B, 0, 2),), True)], PlanError, "b: rows 2 to 4 are never filled"),
        ([Rewrite((Region(A),), (Region(B, 1, 4),), True)], PlanError, "rows 0 to 1 are never"),
        ([Rewrite((Region(A),), (Region(B, 0, 3), Region(B, 2, 4)), True)], PlanError, "rows 2 to 3 are twice"),
        ([Rewrite((Region(A, 0, 3),), (Region(B._replace(shape=(3, 2))),), True)], PlanError, "a: rows 3 onwards would be lost"),
        ([Rewrite((Region(A, 1, 4),), (Region(B._replace(shape=(3, 2))),), True)], PlanError, "a: rows 0 onwards"),
        ([Rewrite((Region(A),), (Region(B), Region(B, 0, 4)), True)], NameCollisionError, "b: two rewrites"),
        ([Rewrite((Region(A),), (Region(B),)), Rewrite((Region(A),), (Region(B),))], NameCollisionError, "b: two rewrites"),
        (
            [Rewrite((Region(A),), (Region(B._replace(shape=(5, 2))),), True)],
            PlanError,
            "takes 40 bytes, but the steps .* move 32",
        ),
        ([Rewrite((Region(A._replace(dtype=U8)),), (Region(B),), True)], PlanError, "plans to read this tensor"),
        ([Rewrite((Region(B),), (Region(B),), True)], PlanError, "b"),
    ],
)
def test_a_step_that_loses_or_invents_bytes_is_refused(rewrites, error, message):
    with pytest.raises(error, match=message):
        resolve([Says(*rewrites)], SpecMap([A]))


def test_the_order_of_tensors_is_that_of_what_they_were_made_of():
    specs = SpecMap([TensorSpec(n, F32, (2, 2)) for n in ("a", "b", "c")])
    after = advance(specs, Rename(where=("b",), to="z").plan(specs))
    assert list(after) == ["a", "z", "c"]
    after = advance(specs, Concat(parts=("c", "a"), into="x").plan(specs))
    assert list(after) == ["b", "x"]


@pytest.mark.parametrize(
    "op",
    [
        Split(where=("p",), into=("x", "y")),
        Unstack(where=("p",), into=("x.{index}",)),
        Split(where=("p",), into=("x", "y"), axis=1, sizes=(1, 2)),
        Transpose(where=("p",)),
        Drop(where=("p",), only_if="zero"),
    ],
)
def test_elements_narrower_than_a_byte_are_never_cut_inside_a_byte(op):
    with pytest.raises(SpecError, match="p"):
        resolve([op], SpecMap([PACKED]))


def test_elements_narrower_than_a_byte_are_not_joined_inside_a_byte():
    specs = SpecMap([TensorSpec("a", F4, (2,)), TensorSpec("b", F4, (2,))])
    with pytest.raises(SpecError, match="does not fill whole bytes"):
        resolve([Concat(parts=("a", "b"), into="x")], specs)


def test_elements_narrower_than_a_byte_move_whole_and_in_rows_of_whole_bytes():
    even = TensorSpec("p", F4, (4, 6))
    resolved = resolve([Rename(where=("p",), to="q"), Split(where=("q",), into=("x", "y"))], SpecMap([even]))
    assert resolved.contents == {"x": (Piece(0, 0, 6),), "y": (Piece(0, 6, 6),)}
    assert resolve([Rename(where=("p",), to="q")], SpecMap([PACKED])).contents == {"q": (Piece(0, 0, 6),)}
