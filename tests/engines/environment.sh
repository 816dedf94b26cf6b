# Sourced by the *_env.sh scripts here: what making an engine's virtual environment has in common.
#   PYTHON            the interpreter, 3.11 (default python3.11)
#   TORCH_INDEX_URL   where pip finds torch 2.13.0+cpu if not in its configured places,
#                     for instance https://download.pytorch.org/whl/cpu
# A stamp file, written last, holds the digest of the scripts and pins that made the environment.

begin_environment() { # DIR FILE...: leave if DIR is up to date with FILEs, else make it anew with torch; sets $python
  dir=$1
  stamp=$dir/.made_from.sha256
  wanted=$(cat "${BASH_SOURCE[0]}" "${@:2}" | sha256sum | cut -d' ' -f1)
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
  # torch first and from its own index: no tool here may pull the build with CUDA
  install_pinned ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch==2.13.0
}

install_pinned() { # --no-deps: every pin is named, so pip has nothing to resolve; modules are compiled when imported
  "$python" -m pip --quiet --disable-pip-version-check install --no-deps --no-compile "$@"
}

finish_environment() { # PROGRAM: stamp the environment if this Python program runs in it and torch has no CUDA
  "$python" -c 'import sys, torch; sys.exit(torch.version.cuda and "torch has CUDA, this needs the +cpu build: set TORCH_INDEX_URL")'
  "$python" -c "$1"
  echo "$wanted" >"$stamp"
}
