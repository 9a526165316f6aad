#!/usr/bin/env bash
# deepspeed.sh HOSTFILE CONFIG [KEY=VALUE]...: train on the machines of a hostfile, by DeepSpeed's launcher.
#
# Example: launchers/deepspeed.sh hosts configs/7b.yaml parallel.tensor=8
#
# A line of the hostfile is `NAME slots=8`. The machines need pdsh, ssh between them without a password, and this
# folder at the same path. MEGAFUSION_SITE names a site whose values every process gets; with Apptainer DeepSpeed's
# launcher runs outside, by the machines' python3. MASTER_ADDR (the first machine's address), MASTER_PORT and
# SSH_PORT may be set. Where a process is lost, training starts again from the last checkpoint; Ctrl-C, SIGTERM and
# SIGUSR1 end it. Logs are RUN/logs/rank-*.log on the machines' shared disk.
set -eu
stopped='' interrupted='' launcher='' DS_ENV_FILE=''
trap '[ -z "$DS_ENV_FILE" ] || rm -f "$DS_ENV_FILE"' EXIT
trap stop INT TERM USR1

# DeepSpeed's runner takes SIGTERM: it ends every machine's processes. While it is being started it may not hear.
stop() {
    stopped=yes interrupted=yes
    [ -n "$launcher" ] || return 0
    { kill -TERM "$launcher"; sleep 1; kill -TERM "$launcher"; } 2> /dev/null &
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launchers/common.sh
. "$here/common.sh"
if [ $# -lt 2 ] || [ ! -f "$1" ]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
hostfile=$1
shift
MEGAFUSION_ROOT=${here%/*}
read_site
run=$(run_of "$@")
id=$(date +%s)-$$

# pdsh hands one line to a shell on each machine: every argument is quoted for that shell. DeepSpeed breaks quotes
# where there is a space.
quoted=()
for argument in "$here/rank.sh" "$run" "$MEGAFUSION_PYTHON" -m megafusion.cli train "$@"; do
    case $argument in
        *[[:space:]]*)
            echo "error: $argument: pdsh cannot hand on white space; write the value into the configuration" >&2
            exit 2
            ;;
    esac
    quoted+=("$(printf %q "$argument")")
done

# What DeepSpeed exports to every machine: the site's values, and nothing else of this shell but NCCL_* and PYTHON*.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
if [ -n "${MEGAFUSION_SITE:-}" ]; then
    "$(host_python)" -m megafusion.launch.site "$MEGAFUSION_SITE" > "$DS_ENV_FILE"
fi

options=(--hostfile "$hostfile" --force_multi --no_python --no_local_rank --no_ssh_check)
options+=(--master_port "${MASTER_PORT:-29500}")
[ -z "${MASTER_ADDR:-}" ] || options+=(--master_addr "$MASTER_ADDR")
[ -z "${SSH_PORT:-}" ] || options+=(--ssh_port "$SSH_PORT")
while :; do
    note_start "$run" "$id" || exit 1
    [ -z "$stopped" ] || exit 75
    "$(host_python)" -m deepspeed.launcher.runner "${options[@]}" "${quoted[@]}" &
    launcher=$!
    [ -z "$stopped" ] || stop
    status_of "$launcher"
    launcher=''
    if [ -n "$stopped" ]; then
        ! may_go_on "$status" || exit 75  # the runner, before it started anything
        exit "$status"
    fi
    [ "$status" -ne 0 ] || is_done "$run" || status=75
    may_go_on "$status" || exit "$status"
    echo "megafusion: ended with status $status; starting again from $(newest_checkpoint "$run")" >&2
done
