# shellcheck shell=bash
# All that differs from site to site. Every script here sources it, or the file that LORAPRUNE_SITE names instead.
# Source it before sbatch, too, since sbatch reads the SBATCH_ variables:
#
#   source slurm/site.sh && sbatch slurm/prune.sbatch CONFIG
#
# Values that the environment already has win.

# Requests to Slurm. Options of sbatch win over these, and these over the #SBATCH lines of the scripts.
# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=project
# export SBATCH_GPUS_PER_NODE=8
# export SBATCH_TIMELIMIT=12:00:00

# Software: modules, the .venv of the checkout, or a container.
# module load cuda
PATH=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)/.venv/bin:$PATH
# More options of every srun, for example a container by pyxis.
# shellcheck disable=SC2034  # job.sh reads it
SRUN_OPTIONS=() # (--container-image=loraprune.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")

# Ranks per node: one per GPU that Slurm has given.
: "${RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"

# Accelerator: DeepSpeed finds GPUs by itself. For CPUs, with as many RANKS_PER_NODE as fit the memory:
# export DS_ACCELERATOR=cpu OMP_NUM_THREADS=4

# Network interfaces, for nodes that have several and find a slow one first.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Memory: torch's segments grow in place, since the widths of micro-batches differ. Fewer channels of NCCL take less
# memory and are slower.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# export NCCL_MAX_P2P_NCHANNELS=8 NCCL_NCHANNELS_PER_NET_PEER=1

# A collective that does not return writes down where every rank stood.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}

# Caches: compiled code lies on the node, downloads lie on the shared file system.
: "${NODE_CACHE:=${TMPDIR:-/tmp}/loraprune-$UID}"
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$NODE_CACHE/triton}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$NODE_CACHE/torch_extensions}
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1

# How often one job may start again before it is given up.
: "${MAX_RESTARTS:=20}"
# 1: a job whose rank fails while its node stays up starts again by itself, if the run got further than before. Examples
# are a memory error and a broken connection.
: "${REQUEUE_FAILED:=0}"
