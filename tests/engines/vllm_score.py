"""Score checkpoints with the real vLLM on the CPU: does it load them, and how well do they predict a text?

Runs inside the environment that vllm_env.sh makes:

    DIR/bin/python tests/engines/vllm_score.py CHECKPOINT... --tokens fixtures/text/heldout.txt --json

prints one line per checkpoint: {"path", "perplexity", "nll", "tokens", "seconds"} or {"path", "error"}. Exit
status 1 if any checkpoint was refused. vLLM is imported once; each checkpoint is served by a fork of that process,
so that one that is refused, or that kills its engine, leaves the others their score. Checkpoints are only read.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

CHUNK = 250  # tokens scored at a time; fixtures/make_tiny_qwen3_5_moe.py cuts the same chunks
ENGINE_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an error reaches us with its own traceback
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def read_sequences(tokens: Path, checkpoint: Path, chunks: int) -> list[list[int]]:
    """Token ids to score: a JSON list of lists as it is; any other text cut into `chunks` of CHUNK tokens."""
    if tokens.suffix == ".json":
        sequences: list[list[int]] = json.loads(tokens.read_text())
        return sequences
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(checkpoint)(tokens.read_text())["input_ids"]
    count = min(chunks, len(ids) // CHUNK)
    return [ids[start : start + CHUNK] for start in range(0, count * CHUNK, CHUNK)]


def score(checkpoint: Path, tokens: Path, chunks: int, each: bool) -> dict[str, Any]:
    """Perplexity of a checkpoint as vLLM serves it; each sequence stands alone, its first token unscored."""
    began = time.monotonic()
    sequences = read_sequences(tokens, checkpoint, chunks)
    from vllm import LLM, SamplingParams, TokensPrompt

    config = json.loads((checkpoint / "config.json").read_text())
    images = {"limit_mm_per_prompt": {"image": 0, "video": 0}} if "vision_config" in config else {}
    engine = LLM(
        str(checkpoint),
        max_model_len=max(map(len, sequences)) + 1,
        enforce_eager=True,
        dtype="bfloat16",
        max_num_seqs=2,
        skip_tokenizer_init=not any((checkpoint / name).exists() for name in TOKENIZER_FILES),
        enable_prefix_caching=False,  # a cached prefix has no log-probabilities
        **images,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
    outputs = engine.generate([TokensPrompt(prompt_token_ids=s) for s in sequences], sampling, use_tqdm=False)
    logprobs = [
        candidates[token].logprob
        for sequence, output in zip(sequences, outputs, strict=True)
        for token, candidates in zip(sequence[1:], output.prompt_logprobs[1:], strict=True)
    ]
    nll = -math.fsum(logprobs) / len(logprobs)
    return {
        "path": str(checkpoint),
        "perplexity": math.exp(nll),
        "nll": nll,
        "tokens": len(logprobs),
        "seconds": round(time.monotonic() - began, 1),
    } | ({"logprobs": logprobs} if each else {})


def score_in_fork(result: Path, log: Path, checkpoint: Path, args: argparse.Namespace) -> None:
    """`score`, its output into `log`, the row or the exception into `result`: an engine's log goes on long after it."""
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        row = score(checkpoint, args.tokens, args.chunks, args.each)
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]  # a bare assert says nothing but its place
        place = f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
        result.write_text(json.dumps({"error": f"{type(error).__name__}: {error} ({place})"}))
        raise
    result.write_text(json.dumps(row))


def score_apart(checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """`score` in a process of its own; an error becomes {"path", "error"}."""
    if not (checkpoint / "config.json").is_file():
        return {"path": str(checkpoint), "error": "no config.json in this folder"}
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        child = multiprocessing.get_context("fork").Process(target=score_in_fork, args=(result, log, checkpoint, args))
        child.start()
        child.join(args.timeout)
        if child.is_alive():
            child.kill()
            child.join()
            return {"path": str(checkpoint), "error": f"no result after {args.timeout:.0f} s"}
        if args.log:
            args.log.mkdir(parents=True, exist_ok=True)
            (args.log / f"{checkpoint.resolve().name}.log").write_text(log.read_text())
        if not result.exists():
            lines = log.read_text().split("\n")[-5:]
            return {"path": str(checkpoint), "error": f"died with status {child.exitcode}: {' '.join(lines)}"}
        row: dict[str, Any] = json.loads(result.read_text())
        return {"path": str(checkpoint)} | row


def main() -> int:
    parser = argparse.ArgumentParser(description="Score checkpoints with vLLM on the CPU.")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help=".json: token ids, [[...], ...]; else a text")
    parser.add_argument("--chunks", type=int, default=24, help=f"of a text, how many chunks of {CHUNK} tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--each", action="store_true", help="with --json, also the log-probability of each token")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each checkpoint")
    parser.add_argument("--log", type=Path, help="keep each engine's log in this folder")
    args = parser.parse_args()
    if not args.tokens.is_file():
        parser.error(f"--tokens {args.tokens}: no such file")
    os.environ.update(ENGINE_ENVIRONMENT)
    # Here, after the environment is set and before the forks, so that each has it.
    import vllm.entrypoints.llm
    import vllm.v1.engine.llm_engine  # noqa: F401

    refused = 0
    for checkpoint in args.checkpoints:
        row = score_apart(checkpoint, args)
        refused += "error" in row
        if args.json:
            print(json.dumps(row), flush=True)
        elif "error" in row:
            print(f"{row['path']}: refused: {row['error']}", flush=True)
        else:
            measured = f"perplexity {row['perplexity']:.4f} on {row['tokens']} tokens, {row['seconds']} s"
            print(f"{row['path']}: {measured}", flush=True)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
