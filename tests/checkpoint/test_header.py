"""Headers are input from strangers: nothing but HeaderError may come of them, and the library must agree."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from tensorsurgeon.checkpoint.header import MAX_HEADER_BYTES, alignment_rank, build_header, parse_header, read_header
from tensorsurgeon.errors import HeaderError
from tensorsurgeon.tensors.dtypes import BF16, DTYPES, F4, F32, I8
from tensorsurgeon.tensors.spec import TensorSpec

ENTRY = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
PATH = Path("x.safetensors")


def blob(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def read(content: bytes, folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return read_header(path)


def library_reads(content: bytes) -> bool:
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


REFUSED = {
    "empty_file": (b"", "too short"),
    "seven_bytes": (b"\0" * 7, "too short"),
    "no_header": (blob(b""), "not valid JSON"),
    "length_of_2_to_the_60": (blob({"a": ENTRY}, b"xx", length=1 << 60), "claims 1152921504606846976 bytes"),
    "length_past_the_end": (blob({"a": ENTRY}, b"xx", length=5000), "it is truncated"),
    "length_of_all_ones": (b"\xff" * 8 + b"{}", "claims 18446744073709551615"),
    "data_cut_off": (blob({"a": ENTRY}, b"x"), "it is truncated"),
    "data_too_long": (blob({"a": ENTRY}, b"xxx"), "bytes that no tensor owns"),
    "not_json": (blob(b"{'a': 1}"), "not valid JSON"),
    "not_utf8": (blob(b'{"\xff\xfe": 1}'), "not valid UTF-8"),
    "byte_order_mark": (blob(b"\xef\xbb\xbf{}"), "not valid JSON"),
    "a_list": (blob([]), "must be a JSON object"),
    "nan": (blob(b'{"a": NaN}'), "NaN"),
    "deep": (blob(b'{"a":' * 100_000), "nested too deeply"),
    "endless_number": (blob(b'{"a": ' + b"9" * 5000 + b"}"), "no size"),
    "twice": (blob(b'{"a":%b,"a":%b}' % ((json.dumps(ENTRY).encode(),) * 2), b"xx"), "a: the name occurs twice"),
    "key_twice": (blob(b'{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"xx"), "occurs twice"),
    "half_a_character": (blob(b'{"\\ud800":%b}' % json.dumps(ENTRY).encode(), b"xx"), "half a character"),
    "half_a_character_in_metadata": (blob(b'{"__metadata__":{"a":"\\udc00"}}'), "half a character"),
    "metadata_not_text": (blob({"__metadata__": {"a": 1}}), "__metadata__ must map"),
    "metadata_a_list": (blob({"__metadata__": []}), "__metadata__ must map"),
    "entry_a_number": (blob({"a": 7}), "a: expected the keys"),
    "entry_without_shape": (blob({"a": {"dtype": "U8", "data_offsets": [0, 2]}}, b"xx"), "a: expected the keys"),
    "entry_with_more": (blob({"a": {**ENTRY, "scale": 2}}, b"xx"), "a: expected the keys"),
    "dtype_unknown": (blob({"a": {**ENTRY, "dtype": "I4"}}, b"xx"), "a: unknown dtype 'I4'"),
    "dtype_a_number": (blob({"a": {**ENTRY, "dtype": 8}}, b"xx"), "a: unknown dtype 8"),
    "shape_negative": (blob({"a": {**ENTRY, "shape": [-2]}}, b"xx"), "a: shape must be"),
    "shape_true": (blob({"a": {**ENTRY, "shape": [True, 2]}}, b"xx"), "a: shape must be"),
    "shape_float": (blob({"a": {**ENTRY, "shape": [2.0]}}, b"xx"), "a: shape must be"),
    "shape_text": (blob({"a": {**ENTRY, "shape": "2"}}, b"xx"), "a: shape must be"),
    "shape_overflows": (blob({"a": {**ENTRY, "shape": [1 << 32, 1 << 32]}}, b"xx"), "larger than any file"),
    "shape_overflows_to_zero": (
        blob({"a": {**ENTRY, "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}}),
        "larger than any",
    ),
    "shape_of_many_large_sizes": (blob({"a": {**ENTRY, "shape": [1 << 62] * 50_000}}, b"xx"), "larger than any file"),
    "size_disagrees": (blob({"a": {**ENTRY, "shape": [3]}}, b"xx"), r"a: U8\[3\] takes 3 bytes but data_offsets \[0, 2\] hold 2"),
    "offsets_reversed": (blob({"a": {**ENTRY, "data_offsets": [2, 0]}}, b"xx"), "hold -2"),
    "offsets_three": (blob({"a": {**ENTRY, "data_offsets": [0, 1, 2]}}, b"xx"), "a: data_offsets must be two"),
    "offsets_negative": (blob({"a": {**ENTRY, "data_offsets": [-2, 0]}}, b"xx"), "a: data_offsets must be two"),
    "overlap": (
        blob({"a": ENTRY, "b": {**ENTRY, "data_offsets": [1, 3]}}, b"xxx"),
        "b: starts at byte 1, expected 2: it overlaps",
    ),
    "same_bytes": (blob({"a": ENTRY, "b": ENTRY}, b"xx"), "b: starts at byte 0, expected 2: it overlaps"),
    "gap": (
        blob({"a": ENTRY, "b": {**ENTRY, "data_offsets": [3, 5]}}, b"xxxxx"),
        "b: starts at byte 3, expected 2: it leaves a gap of 1",
    ),
    "gap_at_the_start": (blob({"a": {**ENTRY, "data_offsets": [1, 3]}}, b"xxx"), "a: starts at byte 1, expected 0"),
    "empty_tensor_inside_another": (
        blob({"a": ENTRY, "b": {"dtype": "U8", "shape": [0], "data_offsets": [1, 1]}}, b"xx"),
        "b: starts at byte 1, expected 2",
    ),
    "half_a_byte": (blob({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"x"), "takes 1.5 bytes"),
}
# What the library takes and we do not: it drops one of two equal names and keys that it does not know.
STRICTER = {"twice", "entry_with_more"}


@pytest.mark.parametrize("label", REFUSED)
def test_a_header_that_lies_is_refused_with_file_and_reason(label, tmp_path):
    content, message = REFUSED[label]
    with pytest.raises(HeaderError, match=message) as caught:
        read(content, tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("label", sorted(REFUSED.keys() - STRICTER))
def test_the_library_refuses_the_same(label):
    assert not library_reads(REFUSED[label][0])


@pytest.mark.parametrize("label", sorted(STRICTER))
def test_where_we_are_stricter_the_library_loses_something(label):
    assert library_reads(REFUSED[label][0])


def test_a_header_of_2_to_the_60_bytes_costs_no_memory_and_no_time(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(1 << 40)
    with pytest.raises(HeaderError, match="more than the 100000000"):
        read_header(path)


def test_a_folder_a_missing_file_and_a_pipe_are_no_headers(tmp_path):
    (tmp_path / "d.safetensors").mkdir()
    for name, message in (("d.safetensors", "not a regular file"), ("none", "No such file")):
        with pytest.raises(HeaderError, match=message):
            read_header(tmp_path / name)


ACCEPTED = {
    "nothing": blob({}),
    "spaces_before_and_after": blob(b"  {} \n\t"),
    "metadata_null": blob({"__metadata__": None}),
    "metadata": blob({"__metadata__": {"format": "pt", "ü": ""}}),
    "empty_name": blob({"": ENTRY}, b"xx"),
    "empty_tensors_anywhere": blob(
        {
            "a": ENTRY,
            "b": {"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]},
            "c": {"dtype": "I8", "shape": [0], "data_offsets": [2, 2]},
        },
        b"xx",
    ),
    "scalar": blob({"a": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}}, b"x" * 8),
    "not_in_the_order_of_names": blob({"a": {**ENTRY, "data_offsets": [2, 4]}, "b": ENTRY}, b"xxxx"),
    "fp4": blob({"a": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}}, b"xxx"),
    "fp6": blob({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"xxx"),
    "zero_before_large": blob({"a": {"dtype": "U8", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}),
}


@pytest.mark.parametrize("label", ACCEPTED)
def test_what_is_odd_but_right_is_read_as_the_library_reads_it(label, tmp_path):
    content = ACCEPTED[label]
    header = read(content, tmp_path)
    wanted = {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in deserialize(content)}
    found = {spec.name: (spec.dtype.name, spec.shape, content[offset : offset + spec.nbytes]) for spec, offset in header.entries}
    assert found == wanted
    assert header.file_bytes == len(content)


@settings(max_examples=400)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_nothing_but_header_errors(content):
    try:
        parse_header(content, 8 + len(content), PATH)
    except HeaderError:
        assert not library_reads(blob(content))


sizes = st.one_of(
    st.integers(-1, 5), st.sampled_from([1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**30]), st.floats(), st.booleans(), st.none()
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from([*DTYPES, "I4", "u8", ""]), st.integers(0, 3)),
        "shape": st.one_of(st.lists(sizes, max_size=4), st.integers()),
        "data_offsets": st.one_of(st.lists(sizes, min_size=1, max_size=3), st.none()),
    }
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)), lambda s: st.lists(s, max_size=3), max_leaves=5
)


@settings(max_examples=400)
@given(st.dictionaries(st.text(max_size=6), st.one_of(entries, values), max_size=4), st.integers(0, 64))
def test_arbitrary_entries_are_taken_only_if_the_library_takes_them(document, data_bytes):
    content = blob(document, b"\0" * data_bytes)
    raw = content[8 : len(content) - data_bytes]
    try:
        header = parse_header(raw, len(content), PATH)
    except HeaderError:
        return
    assert library_reads(content)
    assert {e.spec.name for e in header.entries} == document.keys() - {"__metadata__"}


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(["float32", "float16", "int8", "int64", "bool", "uint16"]), st.lists(st.integers(0, 4), max_size=3)
        ),
        max_size=6,
    ),
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5), st.text(st.characters(codec="utf-8"), max_size=5), max_size=3
    ),
)
def test_what_the_library_writes_is_read_and_what_we_write_the_library_reads(tensors, metadata):
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in tensors.items()}
    content = save(arrays, metadata=metadata or None)
    length = int.from_bytes(content[:8], "little")
    header = parse_header(content[8 : 8 + length], len(content), PATH)
    assert {e.spec.name: e.spec.shape for e in header.entries} == {n: a.shape for n, a in arrays.items()}
    assert header.metadata == metadata

    specs = [entry.spec for entry in header.entries]
    built, offsets, file_bytes = build_header(specs, metadata)
    assert len(built) % 8 == 0
    assert [len(built) + e.offset - 8 - length for e in header.entries] == offsets
    total = sum(spec.nbytes for spec in specs)
    assert file_bytes == len(built) + total
    again = dict(deserialize(built + b"\0" * total))
    assert {name: (e["dtype"], tuple(e["shape"])) for name, e in again.items()} == {
        s.name: (s.dtype.name, s.shape) for s in specs
    }
    assert parse_header(built[8:], len(built) + total, PATH).metadata == metadata


def test_a_name_with_half_a_character_cannot_be_written():
    with pytest.raises(HeaderError, match="half a character"):
        build_header([TensorSpec("\ud800", F32, (1,))], {})


def test_wide_elements_come_first_as_the_library_orders_them():
    arrays = {
        "a": np.zeros(1, np.int8),
        "b": np.zeros(1, np.float32),
        "c": np.zeros(1, ml_dtypes.bfloat16),
        "d": np.zeros(1, np.int64),
    }
    content = save(arrays)
    length = int.from_bytes(content[:8], "little")
    order = [e.spec.dtype for e in parse_header(content[8 : 8 + length], len(content), PATH).entries]
    assert order == sorted(order, key=alignment_rank)
    assert alignment_rank(F32) < alignment_rank(BF16) < alignment_rank(I8) < alignment_rank(F4)
