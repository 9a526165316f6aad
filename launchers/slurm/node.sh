#!/usr/bin/env bash
# node.sh RUN COMMAND...: DeepSpeed's launcher for the ranks of one node; started by srun, once a node.
#
# No ssh: SLURM starts the nodes. SIGUSR1 and SIGTERM, which SLURM sends to every process, must not end DeepSpeed's
# two before the ranks have saved: what is ignored here is ignored there, but by the trainer, which takes both.
set -eu
run=$1
trap '' USR1 TERM
exec "${MEGAFUSION_PYTHON:-python3}" -m deepspeed.launcher.runner --hostfile "$MEGAFUSION_HOSTFILE" \
    --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
    --no_python --no_local_rank "$(dirname "${BASH_SOURCE[0]}")/../rank.sh" "$run" "${@:2}"
