#!/usr/bin/env bash
# A small Slurm on this one machine, for tests: setup.sh install | up | down | start NODE
#
#   install   Debian's packages: slurmctld, slurmd, slurm-client, munge (needs root, and no systemd)
#   up        munge, the controller and two nodes, node1 and node2, of four cores and two GPUs each (said to be)
#   down      cancels all jobs, ends what `up` and `start` started and removes its files
#   start     starts the daemon of a node that died
#
# The GPUs are device files without a device: Slurm counts them and hands them out, nobody can compute on them.
# All files lie in $SLURM_HOME, but for links in /etc/slurm: steps know no other place for the configuration.
set -euo pipefail

SLURM_HOME=${SLURM_HOME:-/tmp/ssd_lit-slurm}
NODES=(node1 node2)
CONFIG_FILES=(slurm.conf gres.conf cgroup.conf)

fail() { echo "setup.sh: $*" >&2; exit 1; }

install() {
    export DEBIAN_FRONTEND=noninteractive
    # Packages start their services unless this refuses; `up` starts them as it needs them.
    local policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' > $policy
        chmod +x $policy
        trap "rm $policy" EXIT
    fi
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 slurmctld slurmd slurm-client munge
}

# launch NAME COMMAND...: a daemon in a session of its own; its id is kept in pids/NAME
launch() {
    local name=$1
    shift
    setsid "$@" > "$SLURM_HOME/log/$name.out" 2>&1 < /dev/null &
    echo $! > "$SLURM_HOME/pids/$name"
}

# until_true SECONDS COMMAND...
until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@" > /dev/null 2>&1; do
        [ $SECONDS -lt $end ] || fail "waited in vain for: $* (logs in $SLURM_HOME/log)"
        sleep 0.2
    done
}

configure() {
    local host memory
    host=$(hostname -s)
    memory=$(awk '/MemTotal/ {print int($2 / 1024 / 2)}' /proc/meminfo)
    cat > "$SLURM_HOME/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$SLURM_HOME/state
SlurmdSpoolDir=$SLURM_HOME/spool/%n
SlurmctldPidFile=$SLURM_HOME/slurmctld.pid
SlurmdPidFile=$SLURM_HOME/%n.pid
SlurmctldLogFile=$SLURM_HOME/log/slurmctld.log
SlurmdLogFile=$SLURM_HOME/log/%n.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
# A node that died is seen soon, and comes back by itself.
SlurmdTimeout=10
ReturnToService=2
KillWait=20
SchedulerParameters=sched_interval=2,bf_interval=2
$(for i in 1 2; do
    echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((6820 + i)) CPUs=4 RealMemory=$memory Gres=gpu:2"
done)
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
CONF
    echo "NodeName=node[1-2] Name=gpu File=$SLURM_HOME/dev/nvidia[0-1]" > "$SLURM_HOME/gres.conf"
    # No plugin above makes a cgroup, but without this line the daemon looks for a version that the machine may lack.
    echo "CgroupPlugin=cgroup/v1" > "$SLURM_HOME/cgroup.conf"
    mkdir -p /etc/slurm
    for file in "${CONFIG_FILES[@]}"; do
        [ -L "/etc/slurm/$file" ] || [ ! -e "/etc/slurm/$file" ] || fail "/etc/slurm/$file belongs to another Slurm"
        ln -sfn "$SLURM_HOME/$file" "/etc/slurm/$file"
    done
}

start() { launch "$1" slurmd -D -N "$1"; }

all_idle() { [ "$(sinfo -h -N -t idle -o %N | wc -l)" = ${#NODES[@]} ]; }

up() {
    [ ! -e "$SLURM_HOME" ] || fail "$SLURM_HOME is there; first: $0 down"
    mkdir -p "$SLURM_HOME"/{log,pids,state,dev} "${NODES[@]/#/$SLURM_HOME/spool/}"
    mknod "$SLURM_HOME/dev/nvidia0" c 1 3
    mknod "$SLURM_HOME/dev/nvidia1" c 1 3
    configure
    if ! munge -n > /dev/null 2>&1; then
        install_folder() { command install -d -o munge -g munge "$@"; }
        install_folder -m 755 /run/munge
        install_folder -m 700 /var/lib/munge /var/log/munge
        launch munged setpriv --reuid=munge --regid=munge --clear-groups munged --foreground
        until_true 10 munge -n
    fi
    launch slurmctld slurmctld -D -i
    until_true 20 scontrol ping
    for node in "${NODES[@]}"; do start "$node"; done
    until_true 30 all_idle
}

# Whether a process still is what `launch` started; its id could have become another's.
is_ours() { tr '\0' ' ' < "/proc/$1/cmdline" 2> /dev/null | grep -Eq '^(\S*/)?(munged|slurmctld|slurmd) '; }

none_left() { [ -z "$(squeue -h)" ]; }

down() {
    if timeout 10 scontrol ping > /dev/null 2>&1; then
        squeue -h -o %A | xargs -r scancel --full
        (until_true 40 none_left) || true
    fi
    for name in "${NODES[@]}" slurmctld munged; do
        local pid
        pid=$(cat "$SLURM_HOME/pids/$name" 2> /dev/null) || continue
        is_ours "$pid" || continue
        kill "$pid"
        (until_true 20 sh -c "! kill -0 $pid") || true
    done
    for file in "${CONFIG_FILES[@]}"; do [ ! -L "/etc/slurm/$file" ] || rm "/etc/slurm/$file"; done
    rm -rf "$SLURM_HOME"
}

case ${1:-} in
    install | up | down) "$1" ;;
    start) start "$2" ;;
    *) sed -n '2,10s/^# \?//p' "$0"; exit 2 ;;
esac
