"""What the Hub says of a card's front matter, as its documentation states it (hub/model-cards, hub/repositories-licenses).

The real one knows more: which models, data sets, tasks and libraries there are.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_MODEL_ID = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z]{2,8})*|multilingual|code")
_RELATIONS = ("adapter", "finetune", "merge", "quantized")
# Of hub/repositories-licenses.
_LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
    epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql
    ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 grok2-community gemma unknown other
    """.split()  # noqa: SIM905  # eighty lines otherwise
)


def errors_of(card: str) -> list[str]:
    """One line for each thing that the Hub refuses; none for a card that it takes."""
    found = _FRONT.match(card)
    if found is None:
        return []
    try:
        front = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(front, dict):
        return ["the metadata must be an object"]
    return [message for key, check in _CHECKS.items() if key in front for message in check(key, front[key])]


def _strings(key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return [f'"{key}" must be an array of strings']
    return []


def _string(key: str, value: Any) -> list[str]:
    return [] if isinstance(value, str) and value else [f'"{key}" must be a string']


def _model_ids(key: str, value: Any) -> list[str]:
    ids = value if isinstance(value, list) else [value]
    wrong = [one for one in ids if not isinstance(one, str) or not _MODEL_ID.fullmatch(one)]
    return [f'"{key}" with value "{one}" is not valid. Use a model id from https://hf.co/models.' for one in wrong]


def _one_of(known: Any) -> Any:
    def check(key: str, value: Any) -> list[str]:
        values = value if isinstance(value, list) else [value]
        return [f'"{key}" must be one of the known ones, not {one!r}' for one in values if one not in known]

    return check


def _languages(key: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [
        f'"{key}" must be an ISO 639 code, not {one!r}'
        for one in values
        if not (isinstance(one, str) and _LANGUAGE.fullmatch(one))
    ]


_CHECKS = {
    "base_model": _model_ids,
    "base_model_relation": _one_of(_RELATIONS),
    "license": _one_of(_LICENSES),
    "license_name": _string,
    "language": _languages,
    "library_name": _string,
    "pipeline_tag": _string,
    "tags": _strings,
}
