#!/usr/bin/env bash
# Slurm on this one machine, playing two nodes of eight CPUs and eight GPUs that are none, to test the sbatch files on.
# As root, without systemd and cgroups; tried with Debian 12's slurm-wlm 22.05.8.
#
#   bash tests/slurm/cluster.sh install        its packages, by apt-get
#   bash tests/slurm/cluster.sh start FOLDER   afterwards SLURM_CONF=FOLDER/slurm.conf is all that its commands need;
#                                              ports and numbers of jobs are chosen so that several can be there
#   bash tests/slurm/cluster.sh stop FOLDER    by the daemons' own pid files
set -euo pipefail

install() {
    if command -v slurmctld munged >/dev/null; then
        return
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
}

configure() {
    local host port=$((11000 + $$ % 2000 * 4))
    host=$(hostname -s)
    # A requeued job waits until its credentials have run out: 120 s by default, 5 s at least.
    cat >slurm.conf <<END
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
FirstJobId=$(($$ % 10000 + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$PWD/munge/socket,cred_expire=5
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
StateSaveLocation=$PWD/state
SlurmdSpoolDir=$PWD/spool.%n
SlurmctldPidFile=$PWD/slurmctld.pid
SlurmdPidFile=$PWD/slurmd.%n.pid
SlurmctldLogFile=$PWD/log/slurmctld.log
SlurmdLogFile=$PWD/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=15
GresTypes=gpu
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=8 RealMemory=1000 Gres=gpu:8
PartitionName=tests Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
END
    touch gpu{0..7}
    echo "NodeName=n[1-2] Name=gpu File=$PWD/gpu[0-7]" >gres.conf
}

start() {
    mkdir -p state log munge
    chmod 755 munge
    dd if=/dev/urandom of=munge/key bs=128 count=1 status=none
    chmod 600 munge/key
    configure
    export SLURM_CONF=$PWD/slurm.conf
    munged --force --socket=munge/socket --key-file=munge/key --pid-file=munge.pid --log-file=log/munge.log \
        --seed-file=munge/seed
    slurmctld -c
    slurmd -N n1
    slurmd -N n2
    for _ in {1..100}; do
        if [ "$(sinfo --noheader --format '%T %D' 2>/dev/null)" = "idle 2" ]; then
            return
        fi
        sleep 0.2
    done
    echo "cluster.sh: the nodes do not come up; see $PWD/log" >&2
    exit 1
}

stop() {
    local file
    export SLURM_CONF=$PWD/slurm.conf
    if [ -e slurmctld.pid ]; then
        squeue --noheader --format %A | xargs --no-run-if-empty scancel # of tests that failed
        for _ in {1..100}; do
            [ -n "$(squeue --noheader)" ] || break
            sleep 0.2
        done
    fi
    for file in slurmd.n1.pid slurmd.n2.pid slurmctld.pid munge.pid; do
        if [ -e "$file" ]; then
            kill "$(cat "$file")" 2>/dev/null || true
        fi
    done
}

case ${1:-} in
    install) install ;;
    start | stop)
        mkdir -p "${2:?a folder}"
        cd "$2"
        PATH=$PATH:/usr/sbin "$1"
        ;;
    *)
        echo "usage: cluster.sh install | start FOLDER | stop FOLDER" >&2
        exit 2
        ;;
esac
