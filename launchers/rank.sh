#!/usr/bin/env bash
# rank.sh RUN COMMAND...: starts one rank of a run, under any launcher.
#
# Sets RANK, LOCAL_RANK and WORLD_SIZE from SLURM's variables if no launcher has set them, appends the output to
# RUN/logs/rank-00000.log and so on, and replaces itself by the command in the site's container, so that signals and
# the exit status are the trainer's own.
set -eu
run=$1
shift
if [ -z "${RANK:-}" ]; then
    : "${SLURM_PROCID:?no RANK: start this through srun, local.sh or deepspeed.sh}"
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
fi
# shellcheck source=launchers/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
mkdir -p "$run/logs"
exec >> "$run/logs/$(printf 'rank-%05d.log' "$RANK")" 2>&1
echo "== $(date +%Y-%m-%dT%H:%M:%S%z) rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, on $(hostname -s)"
in_container "$@"
