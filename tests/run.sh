#!/usr/bin/env bash
# Sets up .venv and runs checks. tests/README.md says what each tier has.
#
#   bash tests/run.sh                       ruff, pyright, shellcheck, then all tests but the heavy ones
#   bash tests/run.sh fast                  ruff, and what finds most faults in three minutes
#   bash tests/run.sh changed [COMMIT]      fast, then the tests that import what has changed since a commit (HEAD)
#   bash tests/run.sh tests/unit -k mask …  pytest alone
#
# The seconds of each test go to tests/durations.txt.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

lint() {
  ruff check
  ruff format --check
}

lint_all() {
  lint
  PYRIGHT_PYTHON_IGNORE_WARNINGS=1 pyright # the warning is about newer releases, which it asks the network for
  find . -path ./.venv -prune -o \( -name '*.sh' -o -name '*.sbatch' -o -path ./.ci/run \) -print0 |
    xargs --null shellcheck --external-sources
}

# Tests of one process come first, on all cores. Then ranks have the machine for themselves, in one pool.
run_tests() {
  local failed=0
  rm -f "$TEST_DURATIONS"
  python -m pytest -m "not heavy and not ranks" --numprocesses auto --dist loadfile "$@" || failed=$?
  python -m pytest -m "ranks and not heavy" "$@" || failed=$?
  return "$failed"
}

set_up dev
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TEST_DURATIONS=$ROOT/tests/durations.txt
prepare

case ${1:-} in
  "")
    lint_all
    run_tests
    ;;
  fast)
    lint
    run_tests @tests/fast.txt
    ;;
  changed)
    lint
    run_tests @tests/fast.txt
    python -m tests.changed "${2:-HEAD}" >"$TEST_DURATIONS.changed"
    run_tests "@$TEST_DURATIONS.changed"
    ;;
  *) exec env --unset=TEST_DURATIONS python -m pytest "$@" ;;
esac
