#!/usr/bin/env bash
# From a bare machine to a pruned model: sets up .venv, then cuts SmolLM2-135M while it fine-tunes. It uses all GPUs, or
# 2 CPU ranks if there are none. The results are in runs/quickstart/. Both models then answer 50 prompts, of which five are
# shown. A second start goes on with a run that was stopped, and shows the answers again.
#
#   bash launch/quickstart.sh [--fresh] [arguments of launch/run.py, such as --set train.steps=40]
#
# --fresh starts over. It removes the results of the run before, by default runs/quickstart.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

CONFIG=launch/configs/quickstart.yaml

# Counts the GPUs that PyTorch can use. PyTorch is asked only if there are any, since its import takes seconds.
count_gpus() {
  local gpus=0
  if [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    if ((gpus == 0)); then echo "PyTorch cannot use the GPUs of this machine (driver too old?): CPU it is" >&2; fi
  fi
  echo "$gpus"
}

# Chooses the largest power of two with a GPU for every rank and a micro-batch of each step for every GPU.
choose_ranks() {
  local gpus=$1 micro_batches ranks=1
  micro_batches=$(python -c 'import sys, yaml
train = yaml.safe_load(open(sys.argv[1]))["train"]
print(train["global_batch_size"] // train["micro_batch_size"])' "$CONFIG")
  while ((ranks * 2 <= gpus && micro_batches % (ranks * 2) == 0)); do ranks=$((ranks * 2)); done
  echo "$ranks"
}

if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
  sed -n '2,/^set /{/^#/s/^# \?//p}' "${BASH_SOURCE[0]}"
  exit 0
fi
fresh=false
arguments=()
for argument in "$@"; do
  if [[ $argument == --fresh ]]; then fresh=true; else arguments+=("$argument"); fi
done

set_up
gpus=$(count_gpus)
if ((gpus == 0)); then
  export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
fi
prepare

# The config is read before anything is removed, so that a typo loses nothing.
folder=$(python launch/run.py --config "$CONFIG" "${arguments[@]}" --show output_dir)
if $fresh && [[ -e $folder/status.json || -d $folder/checkpoints ]]; then rm -rf "$folder"; fi
if ((gpus == 0)); then
  echo "Tuning and pruning on 2 CPU ranks"
  arguments=(--set "train.steps=$(python launch/quickstart_steps.py "$folder")" "${arguments[@]}")
  launcher=(deepspeed --quiet --num_accelerators 2)
else
  ranks=$(choose_ranks "$gpus")
  echo "Tuning and pruning on $ranks of $gpus GPUs"
  launcher=(deepspeed --quiet --num_gpus "$ranks")
  # With --num_gpus the launcher would ignore a choice of devices.
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    CUDA_VISIBLE_DEVICES=$(cut -d , -f "1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")
    export CUDA_VISIBLE_DEVICES
    launcher=(deepspeed --quiet)
  fi
fi
# The launcher's default port may be taken, for example by another run.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
code=0
"${launcher[@]}" --master_port "$port" launch/run.py --config "$CONFIG" --resume auto "${arguments[@]}" || code=$?
if ((code == 0 || code == 3)); then python launch/quickstart_answers.py "$folder"; fi
if ((code == 2)) && [[ -e $folder/status.json ]]; then echo "To start over: bash launch/quickstart.sh --fresh" >&2; fi
exit "$code"
