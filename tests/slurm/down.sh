#!/usr/bin/env bash
# End what up.sh started in $SLURM_LAB, by its pid files.
lab=${SLURM_LAB:?set SLURM_LAB to the folder given to up.sh}
for file in "$lab"/run/slurmd-*.pid "$lab"/run/slurmctld.pid; do
  [ -s "$file" ] && kill "$(cat "$file")" 2>/dev/null
done
[ -e "$lab/run/munge-is-ours" ] && [ -s /run/munge/munged.pid ] && kill "$(cat /run/munge/munged.pid)"
true
