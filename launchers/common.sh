# shellcheck shell=bash
# Sourced by the launchers: what an exit status means, where a run stands, what a site has. Needs bash.
# shellcheck disable=SC1090 # site files are the user's

umask o-w  # nothing that a run writes is writable by the world

# True for the statuses after which the same command goes on: 75 (the trainer: "start me again"), 128 + n (a
# shell or srun: ended by signal n) and 256 - n (DeepSpeed's launcher: the same).
may_go_on() {
    [ "$1" -eq 75 ] || [ "$1" -gt 128 ]
}

# The newest complete checkpoint of a run folder, or "none".
newest_checkpoint() {
    local newest=none path
    for path in "$1"/checkpoints/step-*; do
        [ -d "$path" ] && [[ $path =~ /step-[0-9]+$ ]] && newest=${path##*/}
    done
    echo "$newest"
}

# note_start RUN ID: adds a line (time, ID, newest checkpoint) to RUN/launch/starts.tsv. Fails where the last
# MEGAFUSION_MAX_STARTS (5) starts under this ID, this one included, found the same checkpoint: a crash loop.
note_start() {
    local most=${MEGAFUSION_MAX_STARTS:-5} newest same
    newest=$(newest_checkpoint "$1")
    mkdir -p "$1/launch" "$1/logs"
    printf '%s\t%s\t%s\n' "$(date +%Y-%m-%dT%H:%M:%S%z)" "$2" "$newest" >> "$1/launch/starts.tsv"
    same=$(awk -F'\t' -v id="$2" '$2 == id { n = ($3 == last) ? n + 1 : 1; last = $3 } END { print n }' \
        "$1/launch/starts.tsv")
    if [ "$same" -gt "$most" ]; then
        echo "megafusion: the last $most starts of $1 made no checkpoint after $newest. This is a crash loop, so it" \
            "ends here: look at $1/logs/, then start it anew." >&2
        return 1
    fi
}

# Read the site file that MEGAFUSION_SITE names and its MEGAFUSION_SETUP, such as `module load`; find Python.
read_site() {
    if [ -n "${MEGAFUSION_SITE:-}" ]; then
        set -a
        . "$MEGAFUSION_SITE"
        set +a
    fi
    [ -z "${MEGAFUSION_SETUP:-}" ] || . "$MEGAFUSION_SETUP"
    export MEGAFUSION_PYTHON=${MEGAFUSION_PYTHON:-python3}
    export PYTHONPATH="$MEGAFUSION_ROOT:$MEGAFUSION_ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}"
}

# A port that nothing uses on this machine now, where rank 0 will listen.
free_port() {
    "${MEGAFUSION_PYTHON:-python3}" -c 'import socket; print(socket.create_server(("", 0)).getsockname()[1])'
}

# in_container COMMAND...: become the command, inside the site's container if that is Apptainer's. Enroot's come with
# srun, through SLURM's pyxis plugin (container_options).
in_container() {
    if [ "${MEGAFUSION_CONTAINER:-none}" = apptainer ]; then
        local options=(--pwd "$PWD" --bind "$PWD${MEGAFUSION_CONTAINER_MOUNTS:+,$MEGAFUSION_CONTAINER_MOUNTS}")
        [ ! -e /dev/nvidiactl ] || options+=(--nv)
        set -- apptainer exec "${options[@]}" "${MEGAFUSION_CONTAINER_IMAGE:?}" "$@"
    fi
    exec "$@"
}

# srun's options for a container of Enroot, into the array `options`.
container_options() {
    [ "${MEGAFUSION_CONTAINER:-none}" = enroot ] || return 0
    options+=("--container-image=${MEGAFUSION_CONTAINER_IMAGE:?}" "--container-workdir=$PWD")
    options+=("--container-mounts=$PWD:$PWD${MEGAFUSION_CONTAINER_MOUNTS:+,$MEGAFUSION_CONTAINER_MOUNTS}")
}
