#!/usr/bin/env bash
# Installs Axolotl with the versions that it wants into .venv-axolotl, and runs its test there, on CPUs. By hand:
#
#   bash tests/axolotl.sh [arguments of pytest]
#
# --no-deps leaves out xformers and what else needs CUDA, and the clients of clouds.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

VENV=$ROOT/.venv-axolotl
PINNED=(transformers==5.16.1 peft==0.20.0 accelerate==1.13.0 datasets==4.8.4 trl==1.9.0 deepspeed==0.18.9
  huggingface_hub==1.17.0 tokenizers==0.23.1 bitsandbytes==0.50.2 liger-kernel==0.8.1 torchao==0.17.0
  pydantic==2.12.5 pydantic-core==2.41.5 gradio==6.10.0 typer==0.25.1 posthog==6.7.11 mistral-common==1.11.5
  schedulefree==1.4.1 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 optimum==1.16.2 evaluate==0.4.1
  kernels==0.16.2 fla-core==0.5.2 flash-linear-attention==0.5.2 zstandard==0.22.0 openenv-core==0.1.0
  langdetect==1.0.9 immutabledict==4.2.0 trackio==0.19.0 triton)
REST=(addict aiofiles annotated-doc art backoff brotli colorama coloredlogs distro einops fastapi fastcore ffmpy fire
  gradio-client groovy h11 hf-gradio hf_xet httpcore httpx anyio humanfriendly jsonschema jsonschema-specifications
  kernels-data llvmlite numba orjson platformdirs pycountry pydantic-extra-types pydub python-dateutil python-dotenv
  python-multipart referencing rpds-py safehttpx scipy semantic-version sigstore starlette termcolor tiktoken tomlkit
  uvicorn wandb sentry-sdk gitpython gitdb smmap responses opentelemetry-api
  opentelemetry-sdk)

cd "$ROOT"
[[ -x $VENV/bin/pip ]] || "$(find_python)" -m venv "$VENV"
quietly "$VENV/bin/pip" install --editable "${ROOT}[dev]"
quietly "$VENV/bin/pip" install --no-deps "${PINNED[@]}" "${REST[@]}"
quietly "$VENV/bin/pip" install --no-deps axolotl==0.19.0
export PATH=$VENV/bin:$PATH DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
exec python -m pytest tests/hf/axolotl_package.py "$@"
