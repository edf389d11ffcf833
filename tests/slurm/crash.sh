#!/usr/bin/env bash
# Crash the virtual node $1: SIGKILL, by process id, to its slurmd, the slurmstepds of its jobs, and their tasks. Jobs have
# inherited SLURM_LAB, which tells them from those of another lab's node of that name.
lab=${SLURM_LAB:?set SLURM_LAB to the folder given to up.sh} node=$1
doomed=$(cat "$lab/run/slurmd-$node.pid")
for environment in /proc/[0-9]*/environ; do
  pid=${environment//[^0-9]/}
  if [ "$(tr '\0' '\n' 2>/dev/null <"$environment" | grep -cxF -e "SLURMD_NODENAME=$node" -e "SLURM_LAB=$lab")" = 2 ]; then
    parent=$(awk '/^PPid/{print $2}' "/proc/$pid/status" 2>/dev/null)
    doomed+=" $pid"
    grep -q slurmstepd "/proc/$parent/cmdline" 2>/dev/null && doomed+=" $parent"
  fi
done
kill -9 $doomed 2>/dev/null
true
