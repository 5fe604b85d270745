#!/usr/bin/env bash
# Runs the callback with the oldest versions that other tools pin, each set in its own environment. By hand, and before
# a release; CI runs none of it:
#
#   bash tests/oldest.sh [llamafactory|axolotl]
#
# After the downloads LLaMA-Factory's set takes 193 s on two busy cores, and Axolotl's 225 s. It also writes
# tests/oldest_names.txt.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

declare -A SETS=(
  [llamafactory]="transformers==5.6.0 peft==0.18.1 accelerate==1.11.0 datasets==4.0.0 trl==0.24.0"
  [axolotl]="matplotlib tensorboard transformers==5.16.1 peft==0.20.0 accelerate==1.13.0 datasets==4.8.4 trl==1.9.0 deepspeed==0.18.9"
)
# Axolotl's set also runs the Trainer's tests on ZeRO-3 and DDP. Ten of them stay out, for limits of its versions:
#   fp32 (2): DeepSpeed 0.18.9 makes LoRA bf16, so neither fp32 LoRA nor what all-reduce does beside it can be tried
#   modules_to_save (1): DeepSpeed 0.18.9 looks for its hook by hasattr, which PEFT's wrapper answers for the module inside
#   DDP and a_resume or a mixture's (5): transformers 5.16 loads Adam's state onto the CPU rank's device cpu:0, unknown to torch.load
#   hybrid (2): both trainers cut alike, but at step 3 norms of its delta net differ by more than the 1e-6 of 5.24
TRAINER="not (fp32 or modules_to_save or (DDP and (a_resume or mixture)) or hybrid)"
TOOLS=(pytest pytest-timeout hypothesis pyyaml)

# DeepSpeed stays out of LLaMA-Factory's set, since its own extra wants an older one. matplotlib does, to run without.
run_set() {
  local name=$1 venv=$ROOT/.venv-oldest-$1 pins
  read -ra pins <<<"${SETS[$name]}"
  [[ -x $venv/bin/pip ]] || "$(find_python)" -m venv "$venv"
  echo "Installing ${pins[*]}"
  quietly "$venv/bin/pip" install --editable "${ROOT}[bitsandbytes,gguf]" "${pins[@]}" "${TOOLS[@]}"
  PATH=$venv/bin:$PATH python -m pytest tests/hf/oldest_package.py
  if [[ $name == axolotl ]]; then PATH=$venv/bin:$PATH python -m pytest tests/hf/test_trainer.py -k "$TRAINER"; fi
  "$venv/bin/python" -m tests.support.oldest_names "$name"
}

cd "$ROOT"
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
if (($# == 0)); then set -- llamafactory axolotl; fi
for name in "$@"; do run_set "$name"; done
