#!/bin/bash
# One training run under SLURM, over as many machines as it gets:
#
#   sbatch --nodes 2 scripts/slurm.sh recipes/phase4b.yaml [--key value]
#
# Ten minutes before its time is up, SLURM tells this script, which sends SIGTERM to the run: it saves a checkpoint after
# its present step and ends. The job then puts itself in the queue again and goes on there. After any other end it does
# not: neither after a failure nor after scancel.
#SBATCH --job-name=adamba
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -eu
fail() { echo "error: $1" >&2; exit 2; }
if [ -z "${SLURM_JOB_NODELIST:-}" ] || [ -z "${SLURM_JOB_ID:-}" ]; then fail "submit this file with sbatch"; fi
if [ $# -eq 0 ]; then fail "name a recipe: sbatch --nodes 2 scripts/slurm.sh recipes/phase4b.yaml"; fi
if [ ! -f scripts/multi_node.sh ]; then fail "$PWD: submit from the root of the repository"; fi
ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if [ -z "$ADDRESS" ]; then fail "scontrol finds no host in SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"; fi
export ADDRESS GPUS_PER_MACHINE="${SLURM_GPUS_ON_NODE:-8}" PORT=$((20000 + SLURM_JOB_ID % 20000))
# srun does not take this from sbatch by itself: all processes of a machine would share one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

stopping='' interrupted=yes
trap 'stopping=yes interrupted=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # to the run, not to this script
srun --kill-on-bad-exit=1 sh -c \
  'exec sh scripts/multi_node.sh "$SLURM_NODEID" "$SLURM_NNODES" "$ADDRESS" "$@"' sh "$@" &
run=$!
while [ -n "$interrupted" ]; do # the signal ends a wait, not the run, whose exit code bash keeps for the next wait
  interrupted='' status=0
  wait "$run" || status=$?
done
if [ -n "$stopping" ] && [ "$status" -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
