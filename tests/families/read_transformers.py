"""Which classes of transformers hold the experts of a layer in stacks and gather none from experts stored one by one.

    .venv/bin/python -m tests.families.read_transformers > tensorsurgeon/models/asked/transformers.json

Read, not run: each modeling file's classes of experts say the shapes of their parameters and, in the decorator, how they lie;
`transformers.conversion_mapping` says which model types gather numbered experts (`MergeModulelist`). A checkpoint of the types
listed here must hold stacks, or the experts stay as they were initialised.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist

_MODEL_TYPE = re.compile(r'^    model_type(?:: \w+)? = "([\w-]+)"', re.MULTILINE)
# Two lists of experts under one name on disk, each for tokens of one kind.
_OTHER = ("ernie4_5_vl_moe",)


def stacks() -> dict[str, dict[str, Any]]:
    """By model type: how the experts' stacks lie."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        config = file.with_name(file.name.replace("modeling_", "configuration_"))
        if not config.exists() or file.parent.name in _OTHER:
            continue
        classes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
        form = next((form for cls in classes if (form := form_of(cls)) is not None), None)
        types = _MODEL_TYPE.findall(config.read_text())
        if form is not None and not any(map(gathers, [*types, *(cls.name for cls in classes)])):
            found |= {kind: form for kind in types if kind == file.parent.name or kind.endswith("_text")}
    return dict(sorted(found.items()))


def form_of(cls: ast.ClassDef) -> dict[str, Any] | None:
    """The form of a class that holds `gate_up_proj` and `down_proj` of all experts; None of other classes."""
    shapes = {
        node.targets[0].attr: _sizes(node.value.args[0])
        for node in ast.walk(cls)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Attribute)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "nn.Parameter"
    }
    if not cls.name.endswith("Experts") or len(shapes.get("gate_up_proj", ())) != 3 or len(shapes.get("down_proj", ())) != 3:
        return None
    said = {
        key.arg: ast.literal_eval(key.value) for node in cls.decorator_list if isinstance(node, ast.Call) for key in node.keywords
    }
    transposed = "2 *" not in shapes["gate_up_proj"][1]
    assert said.get("is_transposed", transposed) == transposed, cls.name
    axes = {"axes": ["in", "out"]} if transposed else {}
    return axes | ({} if said.get("is_concatenated", True) else {"interleaved": True})


def _sizes(made: ast.expr) -> list[str]:
    """The sizes in `torch.empty(a, b, c)` or `torch.empty((a, b, c))`."""
    given = made.args if isinstance(made, ast.Call) else []
    if given and isinstance(given[0], ast.Tuple):
        given = given[0].elts
    return [ast.unparse(size) for size in given]


def gathers(name: str) -> bool:
    """Whether what transformers does to a checkpoint for this model type or class stacks numbered tensors."""
    steps = get_checkpoint_conversion_mapping(name) or []
    return any(isinstance(step, MergeModulelist) for one in steps for step in getattr(one, "operations", None) or ())


def main() -> None:
    lines = ",\n".join(f"  {json.dumps(kind)}: {json.dumps(form)}" for kind, form in stacks().items())
    print(f'{{\n "engine": "transformers {transformers.__version__}",\n "stacks": {{\n{lines}\n }}\n}}')


if __name__ == "__main__":
    main()
