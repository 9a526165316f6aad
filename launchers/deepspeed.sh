#!/usr/bin/env bash
# deepspeed.sh HOSTFILE CONFIG [KEY=VALUE]...: train on the machines of a hostfile, by DeepSpeed's launcher.
#
# Example: launchers/deepspeed.sh hosts configs/7b.yaml parallel.tensor=8
#
# A line of the hostfile is `NAME slots=8`. The machines need pdsh, ssh between them without a password, and this
# folder at the same path. MEGAFUSION_SITE names a site, whose values every process gets; with Apptainer, DeepSpeed's
# launcher runs outside of the container, by the machines' python3. MASTER_ADDR (the first machine's address),
# MASTER_PORT and SSH_PORT may be set. After a lost process, training restarts from the last checkpoint; Ctrl-C, SIGTERM,
# SIGUSR1 and SIGHUP end it. Logs are RUN/logs/rank-*.log on the machines' shared disk.
set -eu
stopped='' interrupted='' launcher='' DS_ENV_FILE=''
trap '[ -z "$DS_ENV_FILE" ] || rm -f "$DS_ENV_FILE"' EXIT
trap stop INT TERM USR1 HUP

# On SIGTERM DeepSpeed's runner ends every machine's processes. While it starts it may not handle the signal yet.
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
    exit "$EXIT_REFUSED"
fi
hostfile=$1
shift
MEGAFUSION_ROOT=${here%/*}
read_site
run=$(run_of "$@")
launch=$(date +%s)-$$ start=0

# pdsh passes one line to a shell on each machine, so every argument is quoted for that shell. DeepSpeed breaks quotes
# at spaces.
quoted=()
for argument in "$here/rank.sh" "$run" "$MEGAFUSION_PYTHON" -m megafusion.cli train "$@"; do
    case $argument in
        *[[:space:]]*)
            refuse "$argument: pdsh cannot pass white space; write the value into the configuration"
            ;;
    esac
    quoted+=("$(printf %q "$argument")")
done

# DeepSpeed exports this file to every machine, and of this shell's variables only NCCL_* and PYTHON*.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
site=''
[ -z "${MEGAFUSION_SITE:-}" ] || site=$("$(host_python)" -m megafusion.launch.site "$MEGAFUSION_SITE")

options=(--hostfile "$hostfile" --force_multi --no_python --no_local_rank --no_ssh_check)
options+=(--master_port "${MASTER_PORT:-29500}")
[ -z "${MASTER_ADDR:-}" ] || options+=(--master_addr "$MASTER_ADDR")
[ -z "${SSH_PORT:-}" ] || options+=(--ssh_port "$SSH_PORT")
while :; do
    export MEGAFUSION_START=$launch:$((++start))
    echo "${site:+$site$'\n'}MEGAFUSION_START=$MEGAFUSION_START" > "$DS_ENV_FILE"
    [ -z "$stopped" ] || exit "$EXIT_RETRY"
    (
        trap '' HUP # a closed terminal sends it to the runner, too, which would die without ending the ranks
        exec "$(host_python)" -m deepspeed.launcher.runner "${options[@]}" "${quoted[@]}"
    ) &
    launcher=$!
    [ -z "$stopped" ] || stop
    status_of "$launcher"
    launcher=''
    if [ -n "$stopped" ]; then
        ! may_restart "$status" "$run" || exit "$EXIT_RETRY"  # the runner, before it started anything
        exit "$status"
    fi
    [ "$status" -ne 0 ] || is_done "$run" || status=$EXIT_RETRY
    may_restart "$status" "$run" || exit "$status"
    echo "megafusion: exit status $status; restarting from $(newest_checkpoint "$run")" >&2
done
