"""``config.json``: what it says, and its text, which goes along as it is where nothing in it changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from tensorsurgeon.checkpoint.small_files import MAX_CONFIG_BYTES, Stamp, read_json
from tensorsurgeon.errors import ConfigError

CONFIG_NAME: Final = "config.json"


def read_config(root: Path) -> tuple[bytes | None, dict[str, Any], dict[str, Stamp]]:
    """The text, the content and the stamp of a folder's config; ConfigError if it is none."""
    path = root / CONFIG_NAME
    if not os.path.lexists(path):
        return None, {}, {}
    text, config, stamp = read_json(path, MAX_CONFIG_BYTES, ConfigError)
    if not isinstance(config, dict):
        raise ConfigError(f"must hold a JSON object, found {type(config).__name__}", where=str(path))
    return text, config, {CONFIG_NAME: stamp}
