#!/usr/bin/env bash
# node.sh RUN COMMAND...: runs DeepSpeed's launcher for the ranks of one node; started by srun, once a node.
#
# SLURM starts the nodes, without ssh. SLURM sends SIGUSR1 and SIGTERM to every process, but they must not end
# DeepSpeed's runner and launcher before the ranks have saved. So both ignore them; the ranks inherit that until the
# trainer installs its handlers. For the seconds until then the signal is kept as a file: a trainer that finds it exits
# at once (MEGAFUSION_STOPPED).
set -eu
run=$1
shift
export MEGAFUSION_STOPPED="$run/launch/stopped-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$SLURM_NODEID"
trap 'interrupted=yes; { : > "$MEGAFUSION_STOPPED"; } 2> /dev/null || true' USR1 TERM
trap 'interrupted=yes; kill -USR1 0' HUP # in its place: the ranks leave an ignored SIGHUP ignored
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launchers/common.sh
. "$here/../common.sh"
(
    trap '' USR1 TERM HUP
    in_container "$MEGAFUSION_PYTHON" -m deepspeed.launcher.runner --hostfile "$MEGAFUSION_HOSTFILE" \
        --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
        --no_python --no_local_rank "$here/../rank.sh" "$run" "$@"
) &
status_of $!
# A launcher that was killed leaves its ranks behind: let them save and exit, so that the next start can lock the run.
trap '' TERM
kill -TERM 0
rm -f "$MEGAFUSION_STOPPED"
exit "$status"
