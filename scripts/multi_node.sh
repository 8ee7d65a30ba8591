#!/bin/sh
# One training run over several machines without a scheduler. The same command on each of them, machine 0 first:
#
#   sh scripts/multi_node.sh <machine rank> <number of machines> <address of machine 0> recipes/phase4b.yaml [--key value]
#
# All machines need this repository at the same commit, the same checkpoints folder (shared storage) and the same data.
# PRINT=1 shows the command and runs nothing.
set -eu
if [ $# -lt 4 ]; then sed -n "2,7s|^# *||p" "$0" >&2; exit 2; fi
rank=$1 machines=$2 address=$3 recipe=$4
shift 4
if [ "$rank" -ge "$machines" ]; then echo "error: machine rank $rank must be below $machines" >&2; exit 2; fi
gpus=${GPUS_PER_MACHINE:-8}
script=$(sed -nE '1s|.*(src/run_[a-z]+\.py).*|\1|p' "$recipe")
if [ -z "$script" ]; then echo "error: $recipe: its first line names no src/run_<what>.py" >&2; exit 2; fi
set -- accelerate launch --config_file "${CONFIG:-accelerate_configs/multi_node.yaml}" \
  --num_machines "$machines" --num_processes $((machines * gpus)) --machine_rank "$rank" \
  --main_process_ip "$address" --main_process_port "${PORT:-29500}" "$script" "$recipe" "$@"
echo "$@"
if [ -z "${PRINT:-}" ]; then exec "$@"; fi
