#!/bin/sh
# One training run over several machines without a scheduler. The same command on each of them, machine 0 first:
#
#   sh scripts/multi_node.sh <machine rank> <number of machines> <address of machine 0> recipes/phase4b.yaml [--key value]
#
# All machines need this repository at the same commit, the same checkpoints folder (shared storage) and the same data.
# PRINT=1 shows the command and runs nothing.
set -eu
fail() { echo "error: $1" >&2; exit 2; }
if [ $# -lt 4 ]; then sed -n "2,7s|^# *||p" "$0" >&2; exit 2; fi
rank=$1 machines=$2 address=$3 recipe=$4 gpus=${GPUS_PER_MACHINE:-8}
shift 4
for number in "$rank" "$machines" "$gpus"; do
  case $number in '' | *[!0-9]*) fail "'$number' is no number; give <machine rank> <number of machines>, GPUS_PER_MACHINE" ;; esac
done
if [ "$rank" -ge "$machines" ]; then fail "machine rank $rank must be below $machines"; fi
if [ -z "$address" ]; then fail "the address of machine 0 is empty"; fi
if [ ! -f "$recipe" ]; then fail "$recipe: no such recipe"; fi
script=$(sed -nE '1s|.*(src/run_[a-z]+\.py).*|\1|p' "$recipe")
if [ -z "$script" ]; then fail "$recipe: its first line names no src/run_<what>.py"; fi
# The launcher passes a signal on to its processes; left to itself it kills them 30 seconds later, in the middle of a
# large checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}"
set -- accelerate launch --config_file "${CONFIG:-accelerate_configs/multi_node.yaml}" \
  --num_machines "$machines" --num_processes $((machines * gpus)) --machine_rank "$rank" \
  --main_process_ip "$address" --main_process_port "${PORT:-29500}" "$script" "$recipe" "$@"
echo "$@"
if [ -z "${PRINT:-}" ]; then exec "$@"; fi
