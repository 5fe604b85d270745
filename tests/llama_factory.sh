#!/usr/bin/env bash
# Installs LLaMA-Factory with the versions that it wants into .venv-llama-factory, and runs its test there, on CPUs. By hand:
#
#   bash tests/llama_factory.sh [arguments of pytest]
#
# Its torchaudio wants CUDA. An empty module takes the place of that: only samples with sound call it.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

VENV=$ROOT/.venv-llama-factory
PINNED=(transformers==5.6.0 peft==0.18.1 accelerate==1.11.0 datasets==4.0.0 trl==0.24.0)
REST=(omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 gradio==5.50.0 torchdata==0.11.0 tyro==0.8.14 fire termcolor av
  docstring_parser shtab modelscope tiktoken sse-starlette starlette fastapi uvicorn hf-transfer)

cd "$ROOT"
[[ -x $VENV/bin/pip ]] || "$(find_python)" -m venv "$VENV"
quietly "$VENV/bin/pip" install --editable "${ROOT}[bitsandbytes,pictures]" "${PINNED[@]}" pytest pytest-timeout pyyaml
quietly "$VENV/bin/pip" install --no-deps llamafactory==0.9.5 "${REST[@]}"
"$VENV/bin/python" -c 'import sysconfig; open(sysconfig.get_path("purelib") + "/torchaudio.py", "w").close()'
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
exec "$VENV/bin/python" -m pytest tests/hf/llama_factory_package.py "$@"
