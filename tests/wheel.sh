#!/usr/bin/env bash
# Install the built wheel in a fresh environment and run the command from outside the checkout.
set -euo pipefail
wheel=$(realpath "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check ${PIP_FLAGS:-} -c "$root/constraints.txt" "$wheel"
cd "$work"
venv/bin/python - <<'END'
from importlib.metadata import metadata

found = metadata("tensorsurgeon")
text = found.get_payload()
assert "](https://" in text and "](docs/" not in text and "](tensorsurgeon/" not in text, "links of the long description lead nowhere"
assert {url.partition(",")[0] for url in found.get_all("Project-URL")} == {"Homepage", "Documentation", "Issues"}
END
venv/bin/surgeon --version
venv/bin/python -m tensorsurgeon --version
venv/bin/python -c 'import pathlib, tensorsurgeon; assert (pathlib.Path(tensorsurgeon.__file__).parent / "py.typed").exists()'
venv/bin/surgeon transforms --json >transforms.json
for file in "$root"/transforms/*.yaml; do
    name=$(basename "$file" .yaml)
    grep -q "\"$name\"" transforms.json || { echo "the wheel lacks the transform $name" >&2; exit 1; }
done
venv/bin/surgeon apply quark-w8a8-int8 "$root/fixtures/tiny-qwen3_5-moe" out
venv/bin/surgeon verify out --against "$root/fixtures/tiny-qwen3_5-moe"
echo "wheel ok: $(basename "$wheel")"
