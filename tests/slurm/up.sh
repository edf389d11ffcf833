#!/usr/bin/env bash
# Start a real Slurm of NODES virtual nodes with CPUS cores each on this machine, as root, without systemd and cgroups:
#   SLURM_LAB=<empty folder> up.sh NODES CPUS
# The packages slurmctld, slurmd, slurm-client and munge must be there. Everything it writes is in $SLURM_LAB, but for
# munge's own folders and the names n1, n2, ... in /etc/hosts. Prints the SLURM_CONF to export; down.sh ends it all.
set -euo pipefail
lab=${SLURM_LAB:?set SLURM_LAB to an empty folder} nodes=$1 cpus=$2
host=$(hostname -s) slot=$(($$ % 100))
# Another lab may be at work on this machine. A run listens on a port that follows from its job's number (10000 to 29999):
# two labs must not count from the same one, and their own ports lie above.
while ( : <"/dev/tcp/127.0.0.1/$((30000 + 20 * slot))" ) 2>/dev/null; do slot=$(((slot + 1) % 100)); done
port=$((30000 + 20 * slot))
mkdir -p "$lab"/{state,spool,log,run}

if ! munge -n >/dev/null 2>&1; then
  install -d -o munge -g munge -m 0755 /run/munge
  install -d -o munge -g munge -m 0700 /var/log/munge /var/lib/munge
  if [ ! -s /etc/munge/munge.key ]; then
    (umask 077 && head -c 1024 /dev/urandom >/etc/munge/munge.key)
    chown munge:munge /etc/munge/munge.key
  fi
  setpriv --reuid munge --regid munge --init-groups /usr/sbin/munged
  touch "$lab/run/munge-is-ours"
  for _ in $(seq 50); do munge -n >/dev/null 2>&1 && break; sleep 0.1; done
fi

names=$(seq -s, -f 'n%g' "$nodes")
cat >"$lab/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
SlurmctldPort=$port
FirstJobId=$((1 + 200 * slot))
SlurmctldPidFile=$lab/run/slurmctld.pid
SlurmdPidFile=$lab/run/slurmd-%n.pid
StateSaveLocation=$lab/state
SlurmdSpoolDir=$lab/spool/%n
SlurmctldLogFile=$lab/log/slurmctld.log
SlurmdLogFile=$lab/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
MinJobAge=3600
InactiveLimit=0
OverTimeLimit=0
SlurmdTimeout=30
SlurmctldTimeout=30
SlurmdParameters=config_overrides
CONF
for number in $(seq "$nodes"); do
  getent hosts "n$number" >/dev/null || echo "127.0.0.1 n$number  # a virtual Slurm node" >>/etc/hosts
  mkdir -p "$lab/spool/n$number"
  echo "NodeName=n$number NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + number)) CPUs=$cpus RealMemory=8000 State=UNKNOWN" >>"$lab/slurm.conf"
done
cat >>"$lab/slurm.conf" <<CONF
PartitionName=main Nodes=$names Default=YES MaxTime=INFINITE State=UP PriorityTier=10 OverSubscribe=NO
PartitionName=scavenge Nodes=$names MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 OverSubscribe=NO
CONF

export SLURM_CONF=$lab/slurm.conf
slurmctld -f "$SLURM_CONF" -i
for number in $(seq "$nodes"); do slurmd -f "$SLURM_CONF" -N "n$number"; done
for _ in $(seq 100); do
  [ "$(sinfo -h -N -p main -t idle -o %N 2>/dev/null | sort -u | wc -l)" = "$nodes" ] && { echo "$SLURM_CONF"; exit; }
  sleep 0.2
done
echo "the nodes did not come up; see $lab/log" >&2
exit 1
