#!/bin/bash
# A Slurm of two nodes on this machine, from the programs of Debian's packages munge, slurmctld, slurmd and slurm-client:
#   slurm_here.sh start FOLDER     then SLURM_CONF=FOLDER/slurm.conf for sbatch, squeue, …
#   slurm_here.sh stop FOLDER
# Everything lies in FOLDER, whose path must be short (sockets); nothing of the machine's own Slurm is touched. All
# daemons are this user's. Both nodes are this machine under two names, each with all its cores.
set -euo pipefail

folder=$2
export SLURM_CONF=$folder/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

stop() {
    local file pid
    for file in "$folder"/pid/*; do
        pid=$(cat "$file" 2>/dev/null) && kill "$pid" 2>/dev/null && tail --pid="$pid" -f /dev/null
    done
    true
}

start() {
    mkdir -p "$folder"/{pid,log,state,spool-n1,spool-n2,munge}
    chmod 700 "$folder/munge"
    dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
    chmod 400 "$folder/munge/key"
    local memory
    memory=$(awk '/MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)
    cat >"$SLURM_CONF" <<CONF
ClusterName=here
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CryptoType=crypto/munge
SlurmctldPidFile=$folder/pid/slurmctld
SlurmdPidFile=$folder/pid/slurmd-%n
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd-%n
SlurmdSpoolDir=$folder/spool-%n
StateSaveLocation=$folder/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SwitchType=switch/none
JobRequeue=1
KillWait=30
SlurmdTimeout=30
ReturnToService=0
MpiDefault=none
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$(nproc) RealMemory=$memory
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$(nproc) RealMemory=$memory
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
    {
        munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/pid/munged" \
            --log-file="$folder/log/munged" --seed-file="$folder/munge/seed" --force
        slurmctld -c
        slurmd -N n1
        slurmd -N n2
    } 2>>"$folder/log/start"
    for ((i = 0; i < 100; i++)); do
        [[ $(sinfo --noheader --format=%t 2>/dev/null) == idle && $(sinfo --noheader --format=%D) == 2 ]] && return 0
        sleep 0.2
    done
    echo "the two nodes did not come up:" >&2
    tail -n 20 "$folder"/log/* >&2
    exit 1
}

"$1"
