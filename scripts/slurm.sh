#!/bin/bash
# One training run under SLURM, over as many machines as it gets:
#
#   sbatch --nodes 2 scripts/slurm.sh recipes/phase4b.yaml [--key value]
#
# Ten minutes before its time is up, SLURM sends SIGTERM: the run saves a checkpoint after its present step and ends.
# The job then puts itself in the queue again and goes on there. After any other failure it does not.
#SBATCH --job-name=adamba
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/slurm-%j.log
set -eu
: "${SLURM_JOB_NODELIST:?submit this file with sbatch}"
export ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export GPUS_PER_MACHINE=${SLURM_GPUS_ON_NODE:-8} PORT=$((20000 + SLURM_JOB_ID % 20000))
status=0
srun --kill-on-bad-exit=1 sh -c \
  'exec sh scripts/multi_node.sh "$SLURM_NODEID" "$SLURM_NNODES" "$ADDRESS" "$@"' sh "$@" || status=$?
if [ "$status" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
