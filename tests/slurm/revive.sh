#!/usr/bin/env bash
# Bring the crashed virtual node $1 back.
slurmd -f "${SLURM_LAB:?}/slurm.conf" -N "$1"
scontrol update nodename="$1" state=resume 2>/dev/null
true
