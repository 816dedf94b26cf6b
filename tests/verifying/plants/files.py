"""Faults in tokenizer, chat template, generation config and what may lie beside them."""

from __future__ import annotations

import json

from tests.verifying.plants.ground import Ground, kind, not_here


def written(g: Ground, name: str, text: str) -> None:
    path = g.folder / name
    if not path.exists() or path.read_text() == text:
        not_here()
    path.write_text(text)


def removed(g: Ground, name: str) -> None:
    path = g.folder / name
    if not path.exists():
        not_here()
    path.unlink()


@kind
def a_tokenizer_that_is_none(g: Ground) -> None:
    written(g, "tokenizer.json", "garbage")


@kind
def an_empty_tokenizer(g: Ground) -> None:
    written(g, "tokenizer.json", "{}")


@kind
def no_tokenizer(g: Ground) -> None:
    removed(g, "tokenizer.json")


@kind
def two_tokens_exchanged(g: Ground) -> None:
    with g.json("tokenizer.json") as found:
        words = found["model"]["vocab"]
        one, other = list(words)[1:3]
        words[one], words[other] = words[other], words[one]


@kind
def a_token_less(g: Ground) -> None:
    with g.json("tokenizer.json") as found:
        found["model"]["vocab"].popitem()


@kind
def another_end_of_text(g: Ground) -> None:
    with g.json("tokenizer_config.json") as found:
        found["eos_token"] = "<nothing>"


@kind
def no_tokenizer_config(g: Ground) -> None:
    removed(g, "tokenizer_config.json")


@kind
def a_generation_config_with_another_end(g: Ground) -> None:
    with g.json("generation_config.json") as found:
        found["eos_token_id"] = 5


@kind
def no_generation_config(g: Ground) -> None:
    removed(g, "generation_config.json")


@kind
def a_generation_config_that_is_none(g: Ground) -> None:
    written(g, "generation_config.json", "{")


@kind
def another_chat_template(g: Ground) -> None:
    path = g.folder / "chat_template.jinja"
    if not path.exists():
        not_here()
    path.write_text(path.read_text() + "\n{{ 'and lie' }}")


@kind
def a_chat_template_more(g: Ground) -> None:
    path = g.folder / "chat_template.jinja"
    if path.exists():
        not_here()
    path.write_text("{{ messages }}")


@kind
def code_beside_the_weights(g: Ground) -> None:
    (g.folder / "modeling_other.py").write_text("raise SystemExit\n")


@kind
def merges_cut_off(g: Ground) -> None:
    path = g.folder / "merges.txt"
    if not path.exists():
        not_here()
    path.write_text(path.read_text()[:100])


@kind
def another_preprocessor(g: Ground) -> None:
    with g.json("preprocessor_config.json") as found:
        found["patch_size"] = 99


@kind
def a_copy_of_the_config_that_differs(g: Ground) -> None:
    for name in ("quantize_config.json", "quantization_config.json"):
        path = g.folder / name
        if path.exists():
            path.write_text(json.dumps({**json.loads(path.read_text()), "bits": 3}))
            return
    not_here()
