#!/usr/bin/env bash
# local.sh N CONFIG [KEY=VALUE]...: train with N processes on this machine, each with a GPU where there are some.
#
# Example: launchers/local.sh 2 configs/quickstart.yaml out=runs/two train.micro_batch_size=8 parallel.tensor=2
#
# Logs are RUN/logs/rank-*.log; rank 0's is shown. After a lost process or a preemption of all, training restarts from
# the last checkpoint. Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP (a closed terminal) are forwarded to every rank; then it exits
# with 75, after which the same command resumes, or with the trainer's other status. MEGAFUSION_SITE may name a site.
set -eu
unset MEGAFUSION_STOPPED
stopped='' interrupted='' ranks=() follower=''
trap 'stop TERM' INT TERM HUP
trap 'stop USR1' USR1
trap 'rm -f "${MEGAFUSION_STOPPED:-}"; [ -z "$follower" ] || kill "$follower" 2> /dev/null || true' EXIT

# stop SIGNAL: signals the ranks. One that is starting does not handle signals yet, and finds a file instead.
stop() {
    stopped=$1 interrupted=yes
    local pid
    [ -z "${MEGAFUSION_STOPPED:-}" ] || { : > "$MEGAFUSION_STOPPED"; } 2> /dev/null || true
    for pid in "${ranks[@]}"; do kill "-$1" "$pid" 2> /dev/null || true; done
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launchers/common.sh
. "$here/common.sh"
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit "$EXIT_REFUSED"
fi
world=$1
shift
MEGAFUSION_ROOT=${here%/*}
read_site
run=$(run_of "$@")
launch=$(date +%s)-$$ start=0

start_ranks() {
    local rank port
    port=$(free_port)
    for ((rank = 0; rank < world; rank++)); do
        RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$world MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
            GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo \
            "$here/rank.sh" "$run" "$MEGAFUSION_PYTHON" -m megafusion.cli train "$@" &
        ranks+=($!)
    done
}

mkdir -p "$run/logs" "$run/launch"
export MEGAFUSION_STOPPED="$run/launch/stopped-$launch"
touch "$run/logs/rank-00000.log"
tail -n 0 -F "$run/logs/rank-00000.log" 2> /dev/null &
follower=$!
while :; do
    export MEGAFUSION_START=$launch:$((++start))
    [ -z "$stopped" ] || exit "$EXIT_RETRY"
    start_ranks "$@"
    [ -z "$stopped" ] || stop "$stopped"
    worst=0
    for pid in "${ranks[@]}"; do
        status_of "$pid"
        [ "$status" -le "$worst" ] || worst=$status
    done
    ranks=()
    if [ -n "$stopped" ] || ! may_restart "$worst" "$run"; then
        sleep 0.2  # for the last lines of the log
        ! may_restart "$worst" "$run" || exit "$EXIT_RETRY"  # also if the signal itself ended a rank that was starting
        exit "$worst"
    fi
    echo "megafusion: exit status $worst; restarting from $(newest_checkpoint "$run")" >&2
done
