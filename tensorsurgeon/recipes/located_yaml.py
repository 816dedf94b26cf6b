"""YAML with line numbers and without surprises: every mapping knows the line of each key, and keys are unique."""

from __future__ import annotations

from typing import Any

import yaml

from tensorsurgeon.errors import RecipeError

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Located(dict[str, Any]):
    """A mapping that remembers where it and its keys stood."""

    line: int = 0
    lines: dict[str, int]


def parse_yaml(text: str, where: str) -> Any:
    """The document as plain values, mappings as ``Located``; RecipeError names file and line of a fault."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _value(loader, node, where)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise RecipeError(f"not valid YAML: {error.problem}", where=f"{where}:{line}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"not valid YAML: {error}", where=where) from error
    finally:
        loader.dispose()


def _value(loader: Any, node: Any, where: str) -> Any:
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.ScalarNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise RecipeError(f"unknown tag {node.tag!r}", where=f"{where}:{line}")
    if isinstance(node, yaml.MappingNode):
        result = Located()
        result.line = line
        result.lines = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or not isinstance(key, str):
                raise RecipeError("keys must be words", where=f"{where}:{key_node.start_mark.line + 1}")
            if key in result:
                raise RecipeError(f"key {key!r} occurs twice", where=f"{where}:{key_node.start_mark.line + 1}")
            result[key] = _value(loader, value_node, where)
            result.lines[key] = key_node.start_mark.line + 1
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, child, where) for child in node.value]
    return loader.construct_object(node)
