"""The house has floors: imports go down only, math knows no files, and planning needs no torch.

Imports inside functions and under ``TYPE_CHECKING`` count too: a fact that only shows at run time is still a fact.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tensorsurgeon"

# From the ground up; a room's files may use each other.
ROOMS = (
    "errors",
    "version",
    "machine",
    "tensors",
    "quant",
    "models",
    "checkpoint",
    "formats",
    "planning",
    "ops",
    "engines",
    "recipes",
    "running",
    "calibrate",
    "verifying",
    "look",
    "evaluating",
    "publish",
    "api",
    "cli",
    "__main__",
)
FLOOR = {room: number for number, room in enumerate(ROOMS)}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """``tensorsurgeon.quant.scheme`` is in the room ``quant``."""
    room = module.split(".")[1]
    return "cli" if room.startswith("cli") else room


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and name of every module of this package that a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "tensorsurgeon":
                found += [(node.lineno, f"tensorsurgeon.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module or ""))
    return [(line, name) for line, name in found if name.startswith("tensorsurgeon.")]


def strings(path: Path) -> list[tuple[int, str]]:
    """Line and text of every string that is no docstring."""
    tree = ast.parse(path.read_text())
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for before, statement in pairwise([node, *body] if isinstance(body, list) else []):
            # A string on its own documents the module, class or function, or the field above it.
            is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if is_text and isinstance(before, (*holders, ast.AnnAssign, ast.Assign)):
                docs.add(id(statement.value))
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down_only(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module == "tensorsurgeon":
        return  # the face of the library, above all floors
    own = FLOOR[room_of(module)]
    up = [f"{name_of(path)}:{line}: {name}" for line, name in imports(path) if FLOOR[room_of(name)] > own]
    assert not up


def test_every_room_has_a_floor():
    rooms = {
        room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for path in FILES
        if path.parent != PACKAGE or path.stem != "__init__"
    }
    assert rooms <= FLOOR.keys()
    assert FLOOR.keys() - rooms == set()


def test_the_ground_floor_of_math_knows_neither_formats_nor_files():
    allowed = {"errors", "tensors", "quant"}
    for path in (PACKAGE / "quant").rglob("*.py"):
        assert {room_of(name) for _, name in imports(path)} <= allowed, path


def test_compiled_code_depends_on_its_own_room_only():
    """``loops.kept`` digests the modules of that folder, so whatever came from elsewhere would go stale unseen."""
    for path in (PACKAGE / "quant" / "loops").rglob("*.py"):
        assert all(name.startswith("tensorsurgeon.quant.loops") for _, name in imports(path)), path


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 300


def test_no_module_is_named_after_nothing():
    assert not [p for p in FILES if re.fullmatch(r"_?(utils?|helpers?|common|misc)(_.*)?|.*_(utils?|helpers?)", p.stem)]
    assert not [p for p in PACKAGE.rglob("*") if p.is_dir() and p.name in ("utils", "helpers", "common", "misc")]


# Names that a layout gives to tensors on disk. A module called so elsewhere would know what only a format may know.
ON_DISK = re.compile(
    r"\b(qweight|qzeros|weight_packed|weight_scale(_inv|_2)?|weight_global_scale|weight_zero_point|weight_g_idx|weight_shape|"
    r"input_global_scale|input_scale)\b"
)
MAY_NAME_THEM = {"formats", "verifying", "engines"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_on_disk_names_are_written_in_formats_only(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in MAY_NAME_THEM:
        return
    found = [f"{name_of(path)}:{line}: {text[:60]!r}" for line, text in strings(path) if ON_DISK.search(text)]
    assert not found


# What families call their experts, MTP heads, routers and gates. Elsewhere they are roles (``models/roles.py``).
OF_FAMILIES = re.compile(
    r"\.experts\.|\bmtp\.|\b(shared_expert_gate|block_sparse_moe|in_proj_(a|b|ba))\b|\.(gate|router)\b|^(gate|router)$"
)
ROLE = re.compile(r"role:[\w.-]+")
MAY_NAME_FAMILIES = {"models"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_families_call_things_is_written_in_models_only(path):
    if path.relative_to(PACKAGE).parts[0] in MAY_NAME_FAMILIES:
        return
    found = [f"{name_of(path)}:{line}: {text[:60]!r}" for line, text in strings(path) if OF_FAMILIES.search(ROLE.sub("", text))]
    assert not found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_torch_and_transformers_are_not_imported_at_the_top_of_what_planning_needs(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    tree = ast.parse(path.read_text())
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    heavy = {a.name.split(".")[0] for n in top for a in n.names if isinstance(n, ast.Import)} | {
        (n.module or "").split(".")[0] for n in top if isinstance(n, ast.ImportFrom)
    }
    if room not in ("calibrate", "evaluating", "quant"):
        assert not heavy & {"torch", "transformers", "safetensors", "huggingface_hub"}


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after some code."""
    script = f"{code}\nimport sys\nprint('MODULES', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.rpartition("MODULES")[2].split())


def surgeon(*arguments: str) -> str:
    return f"from tensorsurgeon.cli import main\nmain({list(arguments)!r}, standalone_mode=False)"


FIXTURE = str(ROOT / "fixtures" / "tiny-qwen3_5-moe")


@pytest.mark.parametrize("transform", ["quark-w8a8-int8", "ct-w8a8-int8", "split-experts"])
def test_planning_loads_neither_torch_nor_the_compiler(transform):
    loaded = modules_after(surgeon("plan", transform, FIXTURE))
    assert "tensorsurgeon.planning.plan" in loaded
    assert not loaded & {"torch", "transformers", "numba", "safetensors", "huggingface_hub"}


def test_rounding_to_nearest_on_the_cpu_loads_no_torch(tmp_path):
    loaded = modules_after(surgeon("apply", "quark-w8a8-int8", FIXTURE, str(tmp_path / "out"), "--quiet"))
    assert (tmp_path / "out" / "surgeon.json").exists()
    assert not loaded & {"torch", "transformers"}


def test_surgery_loads_no_compiler(tmp_path):
    loaded = modules_after(surgeon("apply", "split-experts", FIXTURE, str(tmp_path / "out"), "--quiet"))
    assert not loaded & {"torch", "transformers", "numba"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["transforms"]])
def test_small_commands_start_at_once(arguments):
    loaded = modules_after(surgeon(*arguments))
    assert not loaded & {"torch", "numba", "transformers"}
