"""The model card: front matter and text made from what is known, between marks, and what a person wrote outside them.

The library of the Hub reads and writes the front matter, so that what it would refuse is refused here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tensorsurgeon.calibrate.log import LOG_NAME, read_log, summarize
from tensorsurgeon.checkpoint.config_file import read_config
from tensorsurgeon.checkpoint.sink import publish_bytes
from tensorsurgeon.checkpoint.small_files import MAX_CONFIG_BYTES, read_small
from tensorsurgeon.checkpoint.telling import BEGIN, CARD
from tensorsurgeon.errors import CheckpointError, RecipeError, SurgeonError
from tensorsurgeon.evaluating.kept import read_evaluation
from tensorsurgeon.publish.card_text import Known, card_text
from tensorsurgeon.publish.made import read_made
from tensorsurgeon.publish.verified import read_verification
from tensorsurgeon.running.record import add_files, digest_of_file, read_record, recorded_files

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

BASE_CARD: Final = "README.base.md"
END: Final = "<!-- surgeon: end of what is generated -->"
_FRONT: Final = re.compile(r"\A---\r?\n.*?\r?\n---\r?\n", re.DOTALL)
_SERVED: Final = re.compile(r"^vllm serve (\S+)", re.MULTILINE)
NAMELESS: Final = "OWNER/NAME"
# Of the original's front matter: what is as true of its quantized form.
_INHERITED: Final = (
    "license",
    "license_name",
    "license_link",
    "language",
    "pipeline_tag",
    "extra_gated_prompt",
    "extra_gated_fields",
)


def write_card(folder: Path, *, base_model: str | None = None, name: str | None = None) -> Path:
    """Make or refresh the card of a checkpoint; whatever a person wrote outside the generated part stays.

    ``base_model``: the original on the Hub (``owner/name``), where the folder does not tell; ``name``: what this one will be
    there. Both are remembered in the card. CheckpointError for a card
    whose front matter is no YAML, or whose marks are not in order.
    """
    path = folder / CARD
    before = _text_of(path)
    content = refreshed(before, folder, base_model, name).encode()
    is_ours = before is None or _is_recorded(folder, path)
    publish_bytes(path, content)
    # A card that a person wrote in is that person's: nothing of this program may remove it.
    add_files(folder, {CARD: content if is_ours else None})
    return path


def first_card(folder: Path, made: Mapping[str, bytes]) -> Path | None:
    """The card of a checkpoint that was just written, with files that tell how (``made``, by name); None if it has one already.

    The original's card, which travelled along, goes on as README.base.md: it describes another model.
    """
    path = folder / CARD
    for name, content in made.items():
        publish_bytes(folder / name, content)
    files: dict[str, bytes | None] = dict(made)
    before = _text_of(path)
    if before is not None and BEGIN in before:
        add_files(folder, files)
        return None
    if before is not None:
        content = path.read_bytes()
        publish_bytes(folder / BASE_CARD, content)
        files[BASE_CARD] = content
    card = refreshed(None, folder).encode()
    # Known before it lies there: whoever finds it half way must not take it for a person's.
    add_files(folder, {**files, CARD: card})
    publish_bytes(path, card)
    return path


def refreshed(before: str | None, folder: Path, base_model: str | None = None, name: str | None = None) -> str:
    """The whole card, from what it was before (None: there was none)."""
    from huggingface_hub import ModelCardData

    served = None if before is None else _SERVED.search(before)
    known = known_of(folder, name or (served[1] if served else NAMELESS))
    base_card = _text_of(folder / BASE_CARD)
    own = _front_matter(before, folder / CARD) if before is not None else {}
    base = base_model or own.get("base_model") or (known.made or {}).get("source", {}).get("name")
    base_name = base[0] if isinstance(base, list) else base
    front: dict[str, Any] = {"library_name": _library(folder)}
    if base_model is not None and not _is_name(base_model):
        raise RecipeError(f"{base_model!r} is no name of a model on the Hub; give owner/name")
    # The Hub takes no card that names a folder as its original.
    if _is_name(base_name):
        front = {"base_model": base_name, "base_model_relation": "quantized", **front}
    inherited = _front_matter(base_card, folder / BASE_CARD) if base_card is not None else {}
    front |= {key: inherited[key] for key in _INHERITED if key in inherited}
    tags = [*_tags(known, folder), *_texts(inherited.get("tags"))]
    # What is there was put there by a person, or is what would be put there again.
    front = {**front, **own} | ({"base_model": base_model} if base_model else {})
    front["tags"] = list(dict.fromkeys([*_texts(own.get("tags")), *tags]))
    data: ModelCardData = ModelCardData(**{key: value for key, value in front.items() if value is not None})
    generated = f"{BEGIN}\n\n{card_text(known, base_name)}\n\n{END}\n"
    above, below = _around(before, folder / CARD)
    return f"---\n{data.to_yaml()}\n---\n{above or chr(10)}{generated}{below}"


def base_model_of(card: Path) -> str | None:
    """The original by its name on the Hub, as a card has it; None where it has but the name of a folder."""
    base = _front_matter(_text_of(card) or "", card).get("base_model")
    first = base[0] if isinstance(base, list) and base else base
    return first if isinstance(first, str) and "/" in first else None


def known_of(folder: Path, name: str = NAMELESS) -> Known:
    """Everything that lies beside a checkpoint and tells of it; nothing of it depends on what the folder is called."""
    record = read_record(folder)
    log = folder / LOG_NAME
    return Known(
        name=name,
        made=read_made(folder),
        record=record,
        log=summarize(read_log(log)) if log.is_file() else None,
        evaluation=read_evaluation(folder),
        verification=read_verification(folder),
        digest=None if record is None else weights_digest(record),
    )


def weights_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of the digests of all byte ranges: equal weights in equal shards have one."""
    return hashlib.sha256(json.dumps(record["shards"], sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _is_name(base: Any) -> bool:
    """Whether the Hub could know a model by this name."""
    from huggingface_hub import utils
    from huggingface_hub.errors import HFValidationError

    library: Any = utils  # it exports more than its types say

    try:
        library.validate_repo_id(base)
    except HFValidationError:
        return False
    return True


def _library(folder: Path) -> str:
    return "transformers" if (folder / "config.json").is_file() else "safetensors"


def _tags(known: Known, folder: Path) -> list[str]:
    tags = ["quantized", "tensorsurgeon"]
    try:
        config = read_config(folder)[1].get("quantization_config")
    except (OSError, SurgeonError):
        config = None
    if isinstance(config, Mapping) and isinstance(config.get("quant_method"), str):
        tags.append(config["quant_method"])
    for scheme in (known.made or {}).get("schemes", []):
        tags.append(f"{scheme['num_bits']}-bit")
        kind = str(scheme["scheme"]).split()[0].rstrip(",")
        tags.append(f"int{scheme['num_bits']}" if kind == "int" else kind)
    made = known.made
    if made is not None and any(e["engine"] == "vllm" and e["loads_at_tp"] for e in made["engines"]):
        tags.append("vllm")
    return list(dict.fromkeys(tags))


def _texts(value: Any) -> list[str]:
    """What of a list is text; a person's front matter may say anything."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _front_matter(card: str, path: Path) -> dict[str, Any]:
    import yaml

    found = _FRONT.match(card)
    if found is None:
        return {}
    try:
        front = yaml.safe_load(found[0].strip().strip("-"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(
            f"its front matter is no YAML ({why}); mend it between the two lines of ---", where=str(path)
        ) from error
    if front is not None and not isinstance(front, dict):
        raise CheckpointError(f"its front matter is {type(front).__name__} and no mapping; mend it", where=str(path))
    return front or {}


def _around(before: str | None, path: Path) -> tuple[str, str]:
    """What a person wrote above and below the generated part; a card without one goes below whole."""
    if before is None:
        return "", ""
    body = _FRONT.sub("", before, count=1)
    counts = body.count(BEGIN), body.count(END)
    if counts == (0, 0):
        return "", f"\n{body.lstrip()}"
    above, begin, rest = body.partition(BEGIN)
    _, end, below = rest.partition(END)
    if counts != (1, 1) or not begin or not end:
        raise CheckpointError(
            f"has {counts[0]} and {counts[1]} of the lines around what is generated; leave one of each, in order", where=str(path)
        )
    return above, below.removeprefix("\n")


def _text_of(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return read_small(path, MAX_CONFIG_BYTES)[0].decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot be read as text: {error}", where=str(path)) from error


def _is_recorded(folder: Path, path: Path) -> bool:
    """Whether a file is, to the byte, what this program wrote last."""
    record = read_record(folder)
    known = {} if record is None else {found.name: [found.nbytes, found.digest] for found in recorded_files(record)}
    return known.get(path.name) == digest_of_file(path)
