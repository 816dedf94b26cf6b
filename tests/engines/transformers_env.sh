#!/usr/bin/env bash
# Make an environment with transformers, auto-round and compressed-tensors: transformers_env.sh DIR.
# Does nothing where DIR was already made by this script and these pins; environment.sh names the variables it takes.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/environment.sh"

begin_environment "$1" "$here/transformers_env.sh" "$here/transformers_requirements.txt"
install_pinned -r "$here/transformers_requirements.txt"
finish_environment 'import auto_round, compressed_tensors, transformers; print("transformers", transformers.__version__)'
