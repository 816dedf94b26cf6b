#!/usr/bin/env bash
# Make an environment with GPTQModel and its kernels for the CPU: gptqmodel_env.sh DIR.
# Does nothing where DIR was already made by this script and these pins; environment.sh names the variables it takes.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/environment.sh"

begin_environment "$1" "$here/gptqmodel_env.sh" "$here/gptqmodel_requirements.txt"
install_pinned -r "$here/gptqmodel_requirements.txt"
# Its wheel is built here from source, and looks for torch and pcre while building
BUILD_CUDA_EXT=0 install_pinned --no-build-isolation gptqmodel==6.0.3
finish_environment 'import gptqmodel; print("gptqmodel", gptqmodel.__version__)'
