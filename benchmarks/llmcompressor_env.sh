#!/usr/bin/env bash
# Make an environment with llm-compressor, the peer that benchmarks run beside surgeon: llmcompressor_env.sh DIR.
# Does nothing where DIR was already made by this script and these pins; tests/engines/environment.sh names the variables
# it takes. The pins are those that made the golden files.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tests/engines/environment.sh"

pins=$root/fixtures/golden/environments/llmcompressor.txt
begin_environment "$1" "$root/benchmarks/llmcompressor_env.sh" "$pins"
install_pinned -r "$pins"
finish_environment 'import llmcompressor; print("llmcompressor", llmcompressor.__version__)'
