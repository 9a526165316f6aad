#!/usr/bin/env bash
# node.sh RUN COMMAND...: DeepSpeed's launcher for the ranks of one node; started by srun, once a node.
#
# No ssh: SLURM starts the nodes. SIGUSR1 and SIGTERM, which SLURM sends to every process, must not end DeepSpeed's
# two before the ranks have saved: what is ignored in them is ignored in what they start, until the trainer takes both.
# For the seconds until then a file keeps the word: the trainer that finds it ends at once (MEGAFUSION_STOPPED).
set -eu
run=$1
shift
export MEGAFUSION_STOPPED="$run/launch/stopped-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$SLURM_NODEID"
trap 'interrupted=yes; : > "$MEGAFUSION_STOPPED"' USR1 TERM
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launchers/common.sh
. "$here/../common.sh"
(
    trap '' USR1 TERM
    in_container "$MEGAFUSION_PYTHON" -m deepspeed.launcher.runner --hostfile "$MEGAFUSION_HOSTFILE" \
        --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
        --no_python --no_local_rank "$here/../rank.sh" "$run" "$@"
) &
status_of $!
# A launcher that was killed leaves its ranks behind: they save and end, so that the next start finds the run free.
trap '' TERM
kill -TERM 0
rm -f "$MEGAFUSION_STOPPED"
exit "$status"
