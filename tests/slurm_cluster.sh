#!/usr/bin/env bash
# A Slurm cluster of one node for tests/test_slurm.py: it says that it is the reference machine, whatever it runs on.
#
#   tests/slurm_cluster.sh start   as root; does nothing if it runs already, and takes the place of one that is broken
#   tests/slurm_cluster.sh stop    ends its daemons and removes its folder
#   tests/slurm_cluster.sh status  0 if it takes jobs
#
# Needs Debian's or Ubuntu's packages slurm-wlm and munge, and no systemd. Everything is in one folder, and the daemons
# have a key, a socket and ports of their own on 127.0.0.1: a Slurm that the machine has otherwise is left alone.
set -euo pipefail

folder=${MODELMILL_SLURM:-/run/modelmill-slurm}
export SLURM_CONF=$folder/slurm.conf
seconds=60  # for the node to answer
host=$(hostname -s)

write_config() {
    cat > "$SLURM_CONF" << END
ClusterName=modelmill
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/slurmctld
SlurmdSpoolDir=$folder/slurmd
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
# No cgroups: containers have none to give away.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
# What a job was given, asked of the job itself.
TaskProlog=$folder/task_prolog
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
AccountingStorageType=accounting_storage/none
# Jobs that are over can be looked at for a while.
MinJobAge=3600
ReturnToService=2
# The node has what stands here, not what the machine has.
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=16 RealMemory=49152 Gres=gpu:a5000:2
PartitionName=main Nodes=$host Default=YES MaxTime=1-00:00:00
PartitionName=other Nodes=$host MaxTime=1-00:00:00
END
    cat > "$folder/gres.conf" << END
NodeName=$host Name=gpu Type=a5000 File=/dev/null
NodeName=$host Name=gpu Type=a5000 File=/dev/zero
END
    cat > "$folder/task_prolog" << END
#!/bin/sh
echo "\$SLURM_JOB_ID \$SLURM_STEP_ID \${CUDA_VISIBLE_DEVICES-}" >> $folder/devices
END
    # The executor plugin drops SLURM_CONF within a job.
    cat > "$folder/bin/srun" << END
#!/bin/sh
SLURM_CONF=$SLURM_CONF exec $(command -v srun) "\$@"
END
    chmod 755 "$folder/task_prolog" "$folder/bin/srun"
}

# The process that wrote a PID file, if it is that program still: numbers are used again.
running() {
    local pid
    pid=$(cat "$folder/$1.pid" 2> /dev/null) || return 1
    [ "$(cat "/proc/$pid/comm" 2> /dev/null)" = "$1" ] && echo "$pid"
}

takes_jobs() {
    local state
    [ -f "$SLURM_CONF" ] && running munged > /dev/null || return 1
    state=$(sinfo --noheader --partition main --format %T 2> /dev/null) || return 1
    # With a star behind it where the node does not answer.
    case $state in idle | mixed | allocated | completing) ;; *) return 1 ;; esac
}

stop() {
    local program pid
    if takes_jobs; then
        squeue --noheader --format %i | xargs --no-run-if-empty scancel
        sleep 1
    fi
    for program in slurmctld slurmd munged; do
        pid=$(running "$program") || continue
        kill "$pid"
        for _ in $(seq 100); do
            [ -d "/proc/$pid" ] || continue 2
            sleep 0.1
        done
        kill -9 "$pid"
    done
    rm -rf "$folder"
}

start() {
    local program
    for program in munged slurmctld slurmd sbatch; do
        if ! command -v "$program" > /dev/null; then
            echo "there is no $program: apt-get install slurm-wlm munge" >&2
            exit 1
        fi
    done
    stop
    mkdir -p "$folder/slurmctld" "$folder/slurmd" "$folder/bin"
    (umask 077 && head -c 128 /dev/urandom > "$folder/munge.key")
    write_config
    munged --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    slurmctld
    slurmd
    for _ in $(seq $((2 * seconds))); do
        if takes_jobs; then
            return
        fi
        sleep 0.5
    done
    echo "the cluster does not take jobs after $seconds s; its last words:" >&2
    tail -n 5 "$folder"/*.log >&2
    exit 1
}

if [ "$(id -u)" != 0 ]; then
    echo "run it as root: the daemons start jobs for their users" >&2
    exit 1
fi
PATH=$PATH:/usr/sbin:/sbin
case ${1-} in
    start) if ! takes_jobs; then start; fi ;;
    stop) stop ;;
    status) takes_jobs ;;
    *) sed -n 's/^# \{0,1\}//; 3,6p' "$0" >&2; exit 2 ;;
esac
