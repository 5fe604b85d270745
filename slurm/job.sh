# shellcheck shell=bash
# The scripts here source this file. It has the rendezvous, the check of the nodes and one launcher per node. It says
# what signals and the end of the ranks mean for the job.

# shellcheck source=slurm/site.sh
source "${LORAPRUNE_SITE:-$LORAPRUNE_ROOT/slurm/site.sh}"
export PYTHONUNBUFFERED=1

say() {
  echo "[$(date +%FT%T)] $*"
}

fail() {
  say "$*"
  exit 1
}

# The ports come from the number of the job, so that jobs that share a node do not meet.
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${NODES%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 6000))
CHECK_PORT=$((26000 + SLURM_JOB_ID % 6000))
# One task of an array can have the array's own number, which means all tasks to scontrol.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
JOB=${JOB:-$SLURM_JOB_ID}
RESTARTS=${SLURM_RESTART_COUNT:-0}
HOSTFILE=$PWD/$SLURM_JOB_NAME-$SLURM_JOB_ID-$RESTARTS.hostfile
OUTPUT=
RUNNING= # process of the step that has the ranks
ASKED=   # to stop, by USR1
ASKING=  # process that repeats the request to stop

# begin OUTPUT_DIR: gives up if the job was started too often, then checks all nodes.
begin() {
  OUTPUT=$1
  say "job $SLURM_JOB_ID, restart $RESTARTS, on $SLURM_JOB_NODELIST with $RANKS_PER_NODE ranks each: $OUTPUT"
  if ((RESTARTS > MAX_RESTARTS)); then fail "started again $RESTARTS times, MAX_RESTARTS is $MAX_RESTARTS: given up"; fi
  echo "${NODES//$'\n'/" slots=$RANKS_PER_NODE"$'\n'} slots=$RANKS_PER_NODE" >"$HOSTFILE"
  trap 'rm -f "$HOSTFILE"' EXIT
  # shellcheck disable=SC2086  # one argument per node
  step python "$LORAPRUNE_ROOT/slurm/preflight.py" --nodes $NODES --port "$CHECK_PORT" \
    --ranks-per-node "$RANKS_PER_NODE" --output "$OUTPUT" ||
    fail "not all nodes are fit; sbatch --exclude=NODE leaves one out"
}

# step COMMAND…: starts it on each node. One that fails ends all.
step() {
  srun --export=ALL --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --wait=60 --unbuffered "${SRUN_OPTIONS[@]}" \
    "$@" </dev/null
}

# config_value KEY ARGUMENTS…: prints a value of the run config that launch/run.py reads from these arguments.
config_value() {
  srun --export=ALL --nodes=1 --ntasks=1 "${SRUN_OPTIONS[@]}" \
    python "$LORAPRUNE_ROOT/launch/run.py" --show "$1" --config "${@:2}" </dev/null
}

# ranks SCRIPT ARGUMENTS…: runs SCRIPT on all ranks, by one deepspeed launcher per node.
ranks() {
  # SLURM_NODEID has a value on the nodes only. TERM would end the `deepspeed` command at once, and with it the step,
  # while its ranks still save. So it ignores TERM. Its launch.py gets TERM as well and passes it on to the ranks.
  # shellcheck disable=SC2016
  step bash -c 'trap "" TERM; exec deepspeed --quiet --hostfile "$1" --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$2" \
    --master_port "$3" "${@:4}"' _ "$HOSTFILE" "$MASTER_ADDR" "$MASTER_PORT" "$@"
}

# train ARGUMENTS…: starts launch/run.py with these, from the newest checkpoint. It does not return.
train() {
  local code=1 before
  before=$(steps_done)
  if [[ -z $ASKED ]]; then
    code=0
    ranks "$LORAPRUNE_ROOT/launch/run.py" --resume auto --config "$@" &
    RUNNING=$!
    # A trapped signal ends `wait` early.
    while kill -0 "$RUNNING" 2>/dev/null; do wait "$RUNNING" || true; done
    wait "$RUNNING" || code=$?
  fi
  if [[ -n $ASKING ]]; then
    kill "$ASKING" 2>/dev/null || true
    rm -f "$OUTPUT/STOP"
  fi
  if ((code == 3)); then say "the run is finished, but removed less than it was asked to"; exit 3; fi
  if ((code != 0)) && [[ -n $ASKED ]]; then start_again "the time is over"; fi
  if ((${REQUEUE_FAILED:-0} && code != 0 && code != 2)) && got_beyond "$before"; then start_again "a rank failed"; fi
  exit "$code"
}

run_status() {
  if [[ -e $OUTPUT/status.json ]]; then cat "$OUTPUT/status.json"; fi
}

# Prints the steps of the run so far, 0 before there is one.
steps_done() {
  if [[ $(run_status) =~ '"step": '([0-9]+) ]]; then echo "${BASH_REMATCH[1]}"; else echo 0; fi
}

# got_beyond STEP: tells if the run was cut off after that step and still belonged to this job.
got_beyond() {
  local status
  status=$(run_status)
  [[ $status =~ '"state": "'(running|failed)'"' && $status == *"\"job\": \"$SLURM_JOB_ID\""* ]] && (($(steps_done) > $1))
}

# The time is nearly over. The request is a stop file, since launchers give their ranks little time after a signal.
ask_to_stop() {
  say "got USR1: the run is to save and stop"
  if [[ -n $RUNNING && -z $ASKED ]]; then
    # More than once: a run that still loads takes the file for one of an earlier run, and removes it.
    while kill -0 "$RUNNING" 2>/dev/null; do
      if [[ -e $OUTPUT/status.json ]]; then touch "$OUTPUT/STOP"; fi
      sleep 5
    done &
    ASKING=$!
  fi
  ASKED=yes
}

# start_again REASON: requeues this job, unless Slurm does. If it requeues, it does not return.
start_again() {
  local job
  job=$(scontrol --oneliner show job "$JOB") || return 0
  # Slurm can be set up to send USR1 before a preemption, too. After that it requeues by itself. A cancelled job stays
  # cancelled. A job that goes on elsewhere, since this node was lost, is not disturbed.
  if [[ $job != *" PreemptTime=None "* || $job != *" JobState=RUNNING "* || $job != *" Restarts=$RESTARTS "* ]]; then
    return
  fi
  if ((RESTARTS >= MAX_RESTARTS)); then fail "$1, and MAX_RESTARTS is $MAX_RESTARTS: given up"; fi
  say "$1: requeued"
  scontrol requeue "$JOB"
  sleep 600 # Slurm ends this shell
}

trap ask_to_stop USR1
# A job that is requeued or cancelled gets TERM. The ranks get it, too, so this shell just waits for them. It may also
# be left over on a lost node, while the run goes on elsewhere.
trap 'say "got TERM"' TERM
