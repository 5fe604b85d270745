#!/usr/bin/env bash
# The first day on a GPU: measures what was only planned. One GPU of 80 GB, about 25 minutes, nothing to download.
#
#   bash tests/gpu.sh [--minutes N] [--out FOLDER] [--only PART...]
#
# Each part takes 8 minutes at most. Each row is written as it is found, to a JSON file per part in
# tests/benchmarks/results/gpu/CARD/. A second call goes on where the first one ended, and tries again what failed. A
# table at the end has the plan beside what was measured. Without a GPU all of it runs at tiny sizes on the CPU: give it
# an --out of its own then.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -x .venv/bin/python ]]; then PATH=$PWD/.venv/bin:$PATH; fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
exec python -m tests.benchmarks.gpu_day "$@"
