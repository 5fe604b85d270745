#!/usr/bin/env bash
# Sets up .venv and runs every check: ruff, pyright, shellcheck, then all tests. With arguments, only pytest with them:
#
#   bash tests/run.sh [tests/unit -k mask …]
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

set_up dev
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
prepare

if (($# == 0)); then
  ruff check
  ruff format --check
  PYRIGHT_PYTHON_IGNORE_WARNINGS=1 pyright # the warning is about newer releases, which it asks the network for
  find . -path ./.venv -prune -o \( -name '*.sh' -o -name '*.sbatch' -o -path ./.ci/run \) -print0 |
    xargs --null shellcheck --external-sources
  set -- --numprocesses 2 --dist loadfile # starting ranks and reading models keeps one core busy at most
fi
exec python -m pytest "$@"
