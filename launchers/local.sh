#!/usr/bin/env bash
# local.sh N CONFIG [KEY=VALUE]...: train with N processes on this machine, each with a GPU where there are some.
#
# Example: launchers/local.sh 2 configs/quickstart.yaml out=runs/two train.micro_batch_rows=8 parallel.tensor=2
#
# Logs are RUN/logs/rank-*.log; rank 0's is shown. Where a process is lost, or all were told to stop, training
# starts again from the last checkpoint. Ctrl-C, SIGTERM and SIGUSR1 are handed on to every rank; then it ends with
# the trainer's status: 75 means that the same command goes on.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launchers/common.sh
. "$here/common.sh"
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
world=$1
shift
python=${MEGAFUSION_PYTHON:-python3}
run=$("$python" -m megafusion.launch.run_folder "$@")
id=$(date +%s)-$$

stopped='' interrupted='' ranks=() follower=''
trap 'stopped=INT; interrupted=yes; signal_ranks TERM' INT
trap 'stopped=TERM; interrupted=yes; signal_ranks TERM' TERM
trap 'stopped=USR1; interrupted=yes; signal_ranks USR1' USR1
trap '[ -z "$follower" ] || kill "$follower" 2> /dev/null' EXIT

signal_ranks() {
    local pid
    for pid in "${ranks[@]}"; do kill "-$1" "$pid" 2> /dev/null || true; done
}

# The status of one process, which waiting for is not ended by a signal to this shell.
status_of() {
    local answer known=0
    while :; do
        interrupted=
        wait "$1" && answer=0 || answer=$?
        [ "$answer" -eq 127 ] && answer=$known
        [ -n "$interrupted" ] || return "$answer"
        known=$answer
    done
}

start_ranks() {
    local rank port
    port=$(free_port)
    ranks=()
    for ((rank = 0; rank < world; rank++)); do
        RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$world MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
            GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo \
            "$here/rank.sh" "$run" "$python" -m megafusion.cli train "$@" &
        ranks+=($!)
    done
}

mkdir -p "$run/logs"
touch "$run/logs/rank-00000.log"
tail -n 0 -F "$run/logs/rank-00000.log" 2> /dev/null &
follower=$!
while :; do
    note_start "$run" "$id" || exit 1
    start_ranks "$@"
    worst=0
    for pid in "${ranks[@]}"; do
        status_of "$pid" && status=0 || status=$?
        [ "$status" -gt "$worst" ] && worst=$status
    done
    if [ -n "$stopped" ] || ! may_go_on "$worst"; then
        sleep 0.2  # for the last lines of the log
        exit "$worst"
    fi
    echo "megafusion: ended with status $worst; starting again from $(newest_checkpoint "$run")" >&2
done
