#!/usr/bin/env bash
# Start or stop a SLURM cluster of one node on this machine: tests/slurm.sh start|stop FOLDER. Its files are in FOLDER; set
# SLURM_CONF=FOLDER/slurm.conf for sbatch, srun and squeue. Needs root and Debian's packages slurm-wlm and munge.
set -eu
command=$1
folder=$2

if [ "$command" = stop ]; then
    for name in slurmd slurmctld munged; do
        [ ! -e "$folder/$name.pid" ] || kill "$(cat "$folder/$name.pid")" 2>/dev/null || true
    done
    exit 0
fi

mkdir -p "$folder"/{state,spool}
# Munge requires a folder that nobody else can write to. Use a separate key and socket, not the system's.
chmod 0755 "$folder"
head -c 128 /dev/urandom >"$folder/munge.key"
chmod 0400 "$folder/munge.key"
name=$(hostname -s)
free() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

cat >"$folder/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$name(127.0.0.1)
SlurmctldPort=$(free)
SlurmdPort=$(free)
AuthType=auth/munge
# A requeued job waits until its credential expires.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
InactiveLimit=0
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$name NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=test Nodes=$name Default=YES MaxTime=INFINITE State=UP
EOF

munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
export SLURM_CONF=$folder/slurm.conf
slurmctld
slurmd
for _ in $(seq 60); do
    [ "$(sinfo --noheader --format %T 2>/dev/null)" = idle ] && exit 0
    sleep 0.5
done
echo "SLURM's node did not start:" >&2
tail -n 5 "$folder"/*.log >&2
exit 1
