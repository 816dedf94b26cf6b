"""Checkpoints that are nearly right: seeded mutations of headers, indexes, configs, records and recipes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorsurgeon.formats.registry import FORMATS
from tests.checkpoints import INDEX, moe_config, tiny_moe, write_checkpoint
from tests.ops.quantized import CONFIG, dense, write_quantized

# What a mutation puts where something else was: of every type, of every size, and what acts on terminals and file systems.
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    0.0,
    -0.0,
    0.5,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "a",
    "0",
    "null",
    "re:.*",
    "re:(a+)+$",
    "re:(",
    "*",
    "../../etc/passwd",
    "/dev/zero",
    "model.safetensors",
    "x" * 300,
    "\x1b[2J\x07",
    "\ud800",
    "\0",
    "a\nb",
    "BF16",
    "F8_E4M3",
    "int",
    "float",
    "group",
    "channel",
    "tensor",
    "block",
    "pack-quantized",
    "gptq",
    "awq",
    "fp8",
    "quark",
    [],
    [[]],
    [None],
    [0],
    [1, 2],
    [-1],
    [2**62, 2**62],
    ["a"],
    [True],
    {},
    {"a": 1},
    {"": {}},
    [{}],
    [[[[]]]],
)


def bases(folder: Path) -> list[Path]:
    """Sound checkpoints of each kind, to be mutated: floats, stacked experts in shards, and quantized ones with their record."""
    sizes = {"hidden": 32, "inner": 32}
    found = [
        write_checkpoint(folder / "moe", tiny_moe(**sizes), shards=3, config=moe_config(**sizes)),
        write_checkpoint(folder / "dense", dense(), config=CONFIG),
    ]
    for layout in FORMATS:
        fields = {"num_bits": 4, "group_size": 32} if layout in ("ct-packed", "gptq", "gptq-v2", "autoround") else {}
        found.append(write_quantized(folder / layout, layout, **fields))
    return found


def mutate(source: Path, target: Path, rng: random.Random) -> str:
    """Copy ``source`` to ``target`` with one to three mutations; what they were."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return "; ".join(_changed(target, rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))


def _changed(folder: Path, rng: random.Random) -> str:
    change = rng.choice(MUTATIONS)
    try:
        return change(folder, rng)
    except (IndexError, KeyError, TypeError, ValueError, OSError, RecursionError, struct.error) as error:
        return f"nothing left to change ({error!r})"  # an earlier mutation took it


def _json_file(name: str) -> Callable[[Path, random.Random], str]:
    def change(folder: Path, rng: random.Random) -> str:
        path = folder / name
        if not path.exists():
            path = folder / "config.json"
        try:
            document = json.loads(path.read_text())
        except ValueError:
            return f"{path.name}: no JSON any more"
        what = _change_inside(document, rng)
        # As a stranger would write it: halves of characters, NaN and all.
        path.write_text(json.dumps(document), errors="surrogatepass")
        return f"{path.name}: {what}"

    return change


def _change_inside(document: Any, rng: random.Random) -> str:
    """Walk down a random way and put, drop, rename or double something there."""
    way = []
    here: Any = document
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            if isinstance(here, dict):
                here["a"] = rng.choice(VALUES)
            return f"{way}: put into nothing"
        key = rng.choice(keys)
        way.append(key)
        inner = here[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.75:
            here = inner
            continue
        kind = rng.choice(("value", "value", "value", "drop", "rename", "near"))
        if kind == "drop":
            del here[key]
        elif kind == "rename" and isinstance(here, dict):
            here[rng.choice([v for v in VALUES if isinstance(v, str)])] = here.pop(key)
        elif kind == "near" and isinstance(inner, int) and not isinstance(inner, bool):
            here[key] = inner + rng.choice((-128, -8, -1, 1, 8, 128))
        else:
            here[key] = rng.choice(VALUES)
        return f"{way}: {kind}"


def _header(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.8:
        try:
            document = json.loads(data[8 : 8 + length])
        except ValueError:
            return f"{path.name}: no header any more"
        what = _consistent(document, rng) if rng.random() < 0.4 else _change_inside(document, rng)
        raw = json.dumps(document).encode(errors="surrogatepass")
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
        return f"{path.name}: header {what}"
    at = rng.randrange(min(len(data), 8 + length))
    path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
    return f"{path.name}: bit of byte {at}"


def _consistent(document: dict[str, Any], rng: random.Random) -> str:
    """Another shape or dtype of the same bytes: the header stays sound, what it means does not."""
    name = rng.choice([key for key in document if key != "__metadata__"] or [""])
    entry = document.get(name)
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        return "nothing"
    shape = list(entry["shape"])
    kind = rng.choice(("transpose", "flatten", "split", "unsqueeze", "dtype", "name"))
    if kind == "transpose":
        entry["shape"] = shape[::-1]
    elif kind == "flatten":
        numel = 1
        for size in shape:
            numel *= size
        entry["shape"] = [numel]
    elif kind == "split" and shape and isinstance(shape[0], int) and shape[0] % 2 == 0:
        entry["shape"] = [shape[0] // 2, 2, *shape[1:]]
    elif kind == "unsqueeze":
        entry["shape"] = [*shape, 1]
    elif kind == "dtype":
        same = {
            "BF16": "F16",
            "F16": "BF16",
            "F32": "I32",
            "I32": "F32",
            "U8": "I8",
            "I8": "U8",
            "F8_E4M3": "F8_E5M2",
            "I64": "F64",
        }
        entry["dtype"] = same.get(str(entry.get("dtype")), "U8")
    else:
        other = rng.choice([key for key in document if key != name] or [name])
        document[name], document[other] = document[other], document[name]
    return f"{name}: {kind}"


def _file(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    data = path.read_bytes()
    kind = rng.choice(("cut", "grow", "empty", "remove", "text"))
    match kind:
        case "cut":
            path.write_bytes(data[: rng.randrange(len(data) + 1)])
        case "grow":
            path.write_bytes(data + bytes(rng.randrange(1, 100)))
        case "empty":
            path.write_bytes(b"")
        case "remove":
            path.unlink()
            if not any(folder.iterdir()):
                path.write_bytes(b"")
        case "text":
            path.write_text(
                rng.choice(("[" * 20_000, "{" * 10, "null", "9" * 5000, "\ufeff{}", "version https://git-lfs.github.com"))
            )
    return f"{path.name}: {kind}"


def _weights(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    if len(data) < 16:
        return f"{path.name}: nothing to change"
    start = min(8 + struct.unpack("<Q", data[:8])[0], len(data) - 1)
    for _ in range(rng.choice((1, 4, 64))):
        at = rng.randrange(start, len(data))
        data[at] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    path.write_bytes(data)
    return f"{path.name}: weights"


MUTATIONS: tuple[Callable[[Path, random.Random], str], ...] = (
    _json_file("config.json"),
    _json_file("config.json"),
    _json_file("config.json"),
    _json_file(INDEX),
    _json_file("surgeon.json"),
    _header,
    _header,
    _header,
    _file,
    _weights,
)
