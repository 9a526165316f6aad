#!/usr/bin/env bash
# alone.sh COMMAND...: runs a single-process command in the site's container; started by srun, whose task variables do
# not make it a rank.
set -eu
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
# shellcheck source=launchers/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
in_container "$@"
