#!/usr/bin/env bash
# One run on several machines: start this on each of them, with the same arguments, beside the same recipe and data.
#
#   HOST=machine-a bash examples/two_machines.sh train RECIPE --out RUN
#
# RUN is a folder that all machines share: ranks write their shards of a checkpoint there, and read those of others.
# HOST      the machine whose port PORT all others reach; the same on each
# NODES     machines (2)
# PROCESSES ranks on each (its GPUs; without any, 1). [parallel] in the recipe is for NODES x PROCESSES ranks.
# RUN_ID    any word that is the same on each machine, and another for each run at the same time
# RESTARTS  times that a rank may die before the run ends (3); the last checkpoint is resumed
set -euo pipefail

HOST=${HOST:?the machine whose port 29500 all others reach, the same on each}
NODES=${NODES:-2}
PORT=${PORT:-29500}
if [ -z "${PROCESSES:-}" ]; then
  PROCESSES=$( (nvidia-smi -L 2>/dev/null || echo CPU) | wc -l )
fi

# Without this, agents of torch 2.13 keep the addresses of dead ranks when they restart.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
  --nnodes "$NODES" \
  --nproc-per-node "$PROCESSES" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$HOST:$PORT" \
  --rdzv-id "${RUN_ID:-soli}" \
  --max-restarts "${RESTARTS:-3}" \
  -m soli "$@"
