#!/usr/bin/env bash
# alone.sh COMMAND...: becomes the command, in the site's container; started by srun for what needs one process.
# SLURM's variables of a task are no world of ranks to it.
set -eu
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR
# shellcheck source=launchers/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
in_container "$@"
