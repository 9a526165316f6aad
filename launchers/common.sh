# shellcheck shell=bash
# Sourced by the launchers: what an exit status means, where a run stands, what a site has. Needs bash.
# shellcheck disable=SC1090 # site files are the user's

umask o-w  # nothing that a run writes is writable by the world

# refuse WORD...: ends with the status of what the user must mend.
refuse() {
    echo "error: $*" >&2
    exit 2
}

# True for the statuses after which the same command goes on: 75 (the trainer: "start me again"), 128 + n (a
# shell or srun: ended by signal n) and 256 - n (DeepSpeed's launcher: the same).
may_go_on() {
    [ "$1" -eq 75 ] || [ "$1" -gt 128 ]
}

# is_done RUN: whether the run's record says that its last start came to its end. Beside an exit status of 0, which
# DeepSpeed's runner also gives where the launcher below it was killed.
is_done() {
    grep '^ *"ended":' "$1/starts.json" 2> /dev/null | tail -n 1 | grep -Eq '"(finished|stopped)"'
}

# status_of PID: sets `status`. A trapped signal, whose trap sets `interrupted`, does not end the waiting.
status_of() {
    local known=0
    while :; do
        interrupted=''
        wait "$1" && status=0 || status=$?
        [ "$status" -ne 127 ] || status=$known
        [ -n "$interrupted" ] || return 0
        known=$status  # of the process, unless the signal ended the wait; then the next one has it
    done
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

# Read the site that MEGAFUSION_SITE names as --site does (a name in launchers/sites/, or a file) and its
# MEGAFUSION_SETUP, such as `module load`; find Python. MEGAFUSION_ROOT is the folder of megafusion.
read_site() {
    local site=${MEGAFUSION_SITE:-}
    if [ -n "$site" ]; then
        [[ $site = */* || $site = *.env ]] || site=$MEGAFUSION_ROOT/launchers/sites/$site.env
        [ -f "$site" ] || refuse "MEGAFUSION_SITE: $site: no such site file; copy launchers/sites/example.env"
        export MEGAFUSION_SITE=$site
        set -a
        . "$(realpath "$site")" || refuse "MEGAFUSION_SITE: $site: ended with status $?"
        set +a
    fi
    if [ -n "${MEGAFUSION_SETUP:-}" ]; then
        [ -f "$MEGAFUSION_SETUP" ] || refuse "MEGAFUSION_SETUP: $MEGAFUSION_SETUP: no such file"
        set +u  # module systems use what is not set
        . "$(realpath "$MEGAFUSION_SETUP")" || refuse "MEGAFUSION_SETUP: $MEGAFUSION_SETUP: ended with status $?"
        set -u
    fi
    export MEGAFUSION_PYTHON=${MEGAFUSION_PYTHON:-python3}
    export PYTHONPATH="$MEGAFUSION_ROOT:$MEGAFUSION_ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}"
}

# Python of this machine itself: MEGAFUSION_PYTHON is the image's where there is a container.
host_python() {
    if [ "${MEGAFUSION_CONTAINER:-none}" = none ]; then echo "$MEGAFUSION_PYTHON"; else echo python3; fi
}

# A port that nothing uses on this machine now, where rank 0 will listen.
free_port() {
    "$(host_python)" -c 'import socket; print(socket.create_server(("", 0)).getsockname()[1])'
}

# run_of CONFIG [KEY=VALUE]...: the run's folder. Called in a subshell, which it becomes.
run_of() {
    [ "${MEGAFUSION_CONTAINER:-none}" != enroot ] ||
        refuse "Enroot's containers come with srun: use megafusion launch, or name the run's folder in MEGAFUSION_RUN"
    in_container "$MEGAFUSION_PYTHON" -m megafusion.launch.run_folder "$@"
}

# in_container COMMAND...: become the command, inside the site's container if that is Apptainer's. Enroot's come with
# srun, through SLURM's pyxis plugin (container_options).
in_container() {
    if [ "${MEGAFUSION_CONTAINER:-none}" = apptainer ]; then
        local options=(--pwd "$PWD" --bind "$PWD${MEGAFUSION_CONTAINER_MOUNTS:+,$MEGAFUSION_CONTAINER_MOUNTS}")
        [ ! -e /dev/nvidiactl ] || options+=(--nv)
        # What is inside goes into no container again.
        set -- apptainer exec "${options[@]}" "${MEGAFUSION_CONTAINER_IMAGE:?}" env MEGAFUSION_CONTAINER=none "$@"
    fi
    exec "$@"
}

# srun's options for a container of Enroot, into the array `options`.
container_options() {
    [ "${MEGAFUSION_CONTAINER:-none}" = enroot ] || return 0
    options+=("--container-image=${MEGAFUSION_CONTAINER_IMAGE:?}" "--container-workdir=$PWD")
    options+=("--container-mounts=$PWD:$PWD${MEGAFUSION_CONTAINER_MOUNTS:+,$MEGAFUSION_CONTAINER_MOUNTS}")
}
