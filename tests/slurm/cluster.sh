#!/usr/bin/env bash
# A real Slurm (slurmctld, slurmd, munge) of several nodes on this machine, for tests. Root on Debian; no systemd.
#
#   tests/slurm/cluster.sh start       installs the missing Debian packages, starts, returns when all nodes are idle
#   tests/slurm/cluster.sh exec CMD    runs CMD on the login node: sbatch, squeue, scontrol, ssh node1 …
#   tests/slurm/cluster.sh cut N       unplugs the network cable of node N;  join N  plugs it in again
#   tests/slurm/cluster.sh stop        ends everything at once and leaves nothing behind but the Debian packages
#   tests/slurm/cluster.sh obstacle    says why no cluster can run here; nothing if one can
#
# Environment: CLUSTER_DIR (/tmp/loraprune-cluster), NODES (2), CPUS (2 per node; they need not exist).
#
# All of it lives in namespaces of its own: the login node, which is also the controller, and every node have their own
# host name, network (10.77.0.0/24 on a bridge, with no way out), processes and /etc/hosts. The end of the first process
# takes the rest along, orphans too. Only the file system is shared, as on a cluster. Accounting (sacct) is not there.
set -euo pipefail

HERE=$(realpath "${BASH_SOURCE[0]}")
DIR=${CLUSTER_DIR:-/tmp/loraprune-cluster}
NODES=${NODES:-2}
CPUS=${CPUS:-2}
export CLUSTER_DIR=$DIR NODES CPUS SLURM_CONF=$DIR/slurm.conf
OWN=(unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc)
PACKAGES=(slurm-wlm munge iproute2 openssh-server openssh-client pdsh)

fail() {
  printf '%s\n' "$*" >&2
  exit 1
}

# Why a cluster cannot be had here; nothing if it can.
obstacle() {
  if ((EUID != 0)); then
    echo "not root"
  elif ! command -v apt-get >/dev/null && ! command -v slurmctld >/dev/null; then
    echo "no slurmctld here, and no apt-get to install it"
  elif ! "${OWN[@]}" --net true 2>/dev/null; then
    echo "the kernel gives no namespaces"
  fi
}

install_packages() {
  local missing=() package deny=/usr/sbin/policy-rc.d log
  for package in "${PACKAGES[@]}"; do
    [[ $(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
  done
  if ((${#missing[@]} == 0)); then return; fi
  echo "Installing with apt-get: ${missing[*]}" >&2
  # Debian starts the services of a package when it is installed, unless this file says no.
  if [[ ! -e $deny ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$deny"
    chmod +x "$deny"
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  log=$(mktemp)
  if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${missing[@]}"; } \
    >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    fail "apt-get failed (everything it said: $log)"
  fi
  rm -f "$log"
}

address() { echo "10.77.0.$((10 + $1))"; }

write_configuration() {
  local node
  mkdir -p "$DIR"/{state,spool,log,munge,ssh}
  chmod 711 "$DIR" "$DIR/munge"
  (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge/key")
  printf '127.0.0.1 localhost\n10.77.0.1 login\n' >"$DIR/hosts"
  configure_ssh
  echo "CgroupPlugin=disabled" >"$DIR/cgroup.conf" # read from the folder of slurm.conf
  cat >"$DIR/slurm.conf" <<END
ClusterName=test
SlurmctldHost=login(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for this long (120 s by default) before it may start again.
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
SlurmctldPidFile=$DIR/state/slurmctld.pid
SlurmdPidFile=$DIR/state/slurmd.%n.pid
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/ended_jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=20
KillWait=10
UnkillableStepTimeout=60
MinJobAge=3600
MailProg=/bin/true
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
END
  for ((node = 1; node <= NODES; node++)); do
    echo "$(address $node) node$node" >>"$DIR/hosts"
    echo "node$node $(<"$DIR/ssh/key.pub")" >>"$DIR/ssh/known_hosts"
    echo "NodeName=node$node NodeAddr=$(address $node) CPUs=$CPUS State=UNKNOWN" >>"$DIR/slurm.conf"
  done
  cat >>"$DIR/slurm.conf" <<END
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
END
}

# One key for all: the nodes trust each other, as on a cluster. The folder takes the place of /etc/ssh.
configure_ssh() {
  ssh-keygen -q -t ed25519 -N '' -C test -f "$DIR/ssh/key"
  printf '%s\n' "IdentityFile $DIR/ssh/key" "UserKnownHostsFile $DIR/ssh/known_hosts" "BatchMode yes" "LogLevel ERROR" \
    >"$DIR/ssh/ssh_config"
  printf '%s\n' "HostKey $DIR/ssh/key" "AuthorizedKeysFile $DIR/ssh/key.pub" "StrictModes no" "UsePAM no" \
    "PasswordAuthentication no" "PermitRootLogin prohibit-password" "MaxStartups 100" "PidFile none" >"$DIR/ssh/sshd_config"
}

# The first process of the login node.
boot() {
  local node
  be_host login
  mount -t tmpfs tmpfs /run
  mkdir /run/sshd
  ip link set lo up
  ip link add bridge type bridge
  ip address add 10.77.0.1/24 dev bridge
  ip link set bridge up
  munged --foreground --force --key-file="$DIR/munge/key" --socket="$DIR/munge/socket" --pid-file="$DIR/munge/pid" \
    --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed" --num-threads=2 &
  slurmctld -D -i &
  for ((node = 1; node <= NODES; node++)); do
    ip netns add "node$node"
    ip link add "cable$node" type veth peer name eth0 netns "node$node"
    ip link set "cable$node" master bridge up
    ip -n "node$node" link set lo up
    ip -n "node$node" address add "$(address $node)/24" dev eth0
    ip -n "node$node" link set eth0 up
    nsenter --net="/run/netns/node$node" "${OWN[@]}" bash "$HERE" node "node$node" &
  done
  trap 'exit 0' TERM
  while :; do wait || true; sleep 1; done
}

# The first process of a node: it takes in orphans, which slurmd does not.
node() {
  be_host "$1"
  mkdir -p "$DIR/spool/$1"
  /usr/sbin/sshd -E "$DIR/log/sshd-$1.log"
  slurmd -D &
  while :; do wait || true; sleep 1; done
}

be_host() {
  hostname "$1"
  mount --bind "$DIR/hosts" /etc/hosts
  mount --bind "$DIR/ssh" /etc/ssh
}

first_process() {
  [[ -s $DIR/pid ]] && kill -0 "$(<"$DIR/pid")" 2>/dev/null
}

inside() {
  local pid
  first_process || fail "no cluster is running in $DIR; start one: $HERE start"
  pid=$(<"$DIR/pid")
  nsenter --target "$pid" --net --mount --uts --ipc --pid="/proc/$pid/ns/pid_for_children" --wdns="$PWD" "$@"
}

start() {
  local why
  if first_process; then fail "a cluster is running in $DIR already; end it: $HERE stop"; fi
  why=$(obstacle)
  if [[ -n $why ]]; then fail "no cluster: $why"; fi
  if [[ -e $DIR && ! -e $DIR/slurm.conf ]]; then fail "$DIR is there and holds no cluster; choose another CLUSTER_DIR"; fi
  install_packages
  rm -rf "$DIR"
  write_configuration
  setsid "${OWN[@]}" --net bash "$HERE" boot </dev/null >"$DIR/log/boot.log" 2>&1 &
  echo $! >"$DIR/pid"
  wait_until_idle
}

wait_until_idle() {
  local tries
  for ((tries = 0; tries < 100; tries++)); do
    if [[ $(inside sinfo --noheader --Node --partition=low --format=%T 2>/dev/null | grep -cx idle) == "$NODES" ]]; then
      return
    fi
    sleep 0.2
  done
  tail -n 20 "$DIR"/log/* >&2
  stop
  fail "the cluster did not become idle"
}

stop() {
  if first_process; then
    kill -KILL "$(<"$DIR/pid")" # unshare; with it goes the first process inside, and with that all others
    while first_process; do sleep 0.1; done
  fi
  rm -rf "$DIR"
}

case ${1:-} in
  start | stop | boot) "$1" ;;
  node) node "$2" ;;
  exec) shift && inside "$@" ;;
  cut) inside ip link set "cable$2" down ;;
  join) inside ip link set "cable$2" up ;;
  obstacle) obstacle ;;
  *) fail "usage: $0 start|stop|exec CMD|cut N|join N|obstacle" ;;
esac
