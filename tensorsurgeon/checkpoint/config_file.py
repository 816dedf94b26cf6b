"""``config.json``: what it says, and its text, which goes along as it is where nothing in it changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from tensorsurgeon.checkpoint.small_files import MAX_CONFIG_BYTES, Stamp, parse_json, read_small
from tensorsurgeon.errors import ConfigError

CONFIG_NAME: Final = "config.json"


def read_config(root: Path) -> tuple[bytes | None, dict[str, Any], dict[str, Stamp]]:
    """The text, the content and the stamp of a folder's config; ConfigError if it is none."""
    path = root / CONFIG_NAME
    if not os.path.lexists(path):
        return None, {}, {}
    try:
        text, stamp = read_small(path, MAX_CONFIG_BYTES)
    except PermissionError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from error
    try:
        config = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"is not valid JSON: {error}", where=str(path)) from error
    if not isinstance(config, dict):
        raise ConfigError(f"must hold a JSON object, found {type(config).__name__}", where=str(path))
    return text, config, {CONFIG_NAME: stamp}
