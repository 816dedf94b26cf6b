"""Ask compressed-tensors' own classes, in their own environment, to parse a config and match every module.

    CT_PYTHON ask_compressed_tensors.py QUESTIONS ANSWERS

As ask_vllm.py, for compressed-tensors configs and HF names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match


def main() -> None:
    linear = torch.nn.Linear(1, 1)
    answers = {}
    for case, question in json.loads(Path(sys.argv[1]).read_text()).items():
        config = QuantizationConfig.model_validate(question["config"])
        found = answers[case] = {}
        for name, _ in question["modules"]:
            found[name] = None
            if any(is_match(name, linear, entry) for entry in config.ignore):
                continue
            for group in config.config_groups.values():
                if is_match(name, linear, group.targets):
                    found[name] = group.weights.num_bits
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
