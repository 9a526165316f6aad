# shellcheck shell=bash
# Sourced by the launchers: exit statuses, the state of a run, the site. Needs bash.
# shellcheck disable=SC1090 # site files are the user's

umask o-w  # no file of a run is world-writable

# Exit statuses, as in megafusion/errors.py.
# shellcheck disable=SC2034 # for the scripts that source this file
EXIT_FAILED=1 EXIT_REFUSED=2 EXIT_RETRY=75

# refuse WORD...: exits with the status for bad input.
refuse() {
    echo "error: $*" >&2
    exit "$EXIT_REFUSED"
}

# may_restart STATUS RUN: whether the same command may be run again: after EXIT_RETRY, 128 + n (a shell or srun: ended
# by signal n) or 256 - n (DeepSpeed's launcher: the same). 255 is also ssh's and apptainer's status for a command that
# they could not start, so it counts only if the trainer has recorded this start. Crash loops are the trainer's
# decision (megafusion/resilience/attempts.py): it counts the starts by MEGAFUSION_START, and exits with EXIT_FAILED.
may_restart() {
    [ "$1" -ne 255 ] || grep -q "\"start\": \"${MEGAFUSION_START:?}\"" "$2/starts.json" 2> /dev/null || return 1
    [ "$1" -eq "$EXIT_RETRY" ] || [ "$1" -gt 128 ]
}

# is_done RUN: whether the run's record says that its last attempt finished. An exit status of 0 is not enough, because
# DeepSpeed's runner returns it as well if the launcher below it was killed.
is_done() {
    grep '^ *"ended":' "$1/starts.json" 2> /dev/null | tail -n 1 | grep -Eq '"(finished|stopped)"'
}

# status_of PID: waits and sets `status`. A trapped signal, whose trap sets `interrupted`, does not end the wait. For a
# process that ends while the signal ends the wait, the next wait returns -1 (bash 5.2) or 127: then the status is that
# of the first wait, 128 + n.
status_of() {
    local known=0
    while :; do
        interrupted=''
        wait "$1" && status=0 || status=$?
        [[ $status != @(-1|127) ]] || status=$known
        [ -n "$interrupted" ] || return 0
        known=$status  # the process's, unless the signal ended the wait; then the next wait returns it
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

# read_site: sources the site of MEGAFUSION_SITE (as of --site: a name in launchers/sites/, or a file) and its
# MEGAFUSION_SETUP, and finds Python. MEGAFUSION_ROOT is the folder of megafusion.
read_site() {
    local site=${MEGAFUSION_SITE:-} setup
    site=${site/#\~\//$HOME/}
    if [ -n "$site" ]; then
        [[ $site = */* || $site = *.env ]] || site=$MEGAFUSION_ROOT/launchers/sites/$site.env
        [ -f "$site" ] || refuse "MEGAFUSION_SITE: $site: no such site file; copy launchers/sites/example.env"
        export MEGAFUSION_SITE=$site
        set -a
        # An editor of Windows leaves a byte-order mark and carriage returns.
        eval "$(sed $'1s/^\xef\xbb\xbf//; s/\r$//' "$site")" || refuse "MEGAFUSION_SITE: $site: ended with status $?"
        set +a
    fi
    setup=${MEGAFUSION_SETUP:-}
    setup=${setup/#\~\//$HOME/}
    if [ -n "$setup" ]; then
        [ -f "$setup" ] || refuse "MEGAFUSION_SETUP: $setup: no such file"
        ! grep -q $'\r$' "$setup" ||
            refuse "MEGAFUSION_SETUP: $setup: has Windows line ends; convert them: sed -i 's/\r\$//' $setup"
        set +u  # module systems use unset variables
        . "$(realpath "$setup")" || refuse "MEGAFUSION_SETUP: $setup: ended with status $?"
        set -u
    fi
    export MEGAFUSION_PYTHON=${MEGAFUSION_PYTHON:-python3}
    export PYTHONPATH="$MEGAFUSION_ROOT:$MEGAFUSION_ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}"
}

# Python of this machine: with a container, MEGAFUSION_PYTHON is the image's.
host_python() {
    if [ "${MEGAFUSION_CONTAINER:-none}" = none ]; then echo "$MEGAFUSION_PYTHON"; else echo python3; fi
}

# A free port of this machine, for rank 0 to listen on.
free_port() {
    "$(host_python)" -c 'import socket; print(socket.create_server(("", 0)).getsockname()[1])'
}

# run_of CONFIG [KEY=VALUE]...: prints the run's folder. Replaces the (sub)shell.
run_of() {
    [ "${MEGAFUSION_CONTAINER:-none}" != enroot ] ||
        refuse "enroot's containers need srun: use megafusion launch, or set MEGAFUSION_RUN to the run's folder"
    in_container "$MEGAFUSION_PYTHON" -m megafusion.launch.run_folder "$@"
}

# in_container COMMAND...: replaces the shell by the command, inside the site's container if that is Apptainer's. For
# Enroot, srun starts the container through SLURM's pyxis plugin (container_options).
in_container() {
    if [ "${MEGAFUSION_CONTAINER:-none}" = apptainer ]; then
        local options=(--pwd "$PWD" --bind "$PWD${MEGAFUSION_CONTAINER_MOUNTS:+,$MEGAFUSION_CONTAINER_MOUNTS}")
        [ ! -e /dev/nvidiactl ] || options+=(--nv)
        # A command inside must not start a container again.
        set -- apptainer exec "${options[@]}" "${MEGAFUSION_CONTAINER_IMAGE:?}" env MEGAFUSION_CONTAINER=none "$@"
    fi
    exec "$@"
}

# step_options RANKS: adds srun's options for the environment, the cores of a task of so many ranks, and Enroot to the
# array `options`.
step_options() {
    local cpus=${SLURM_CPUS_PER_TASK:-} # srun does not inherit it since 22.05
    [ -z "$cpus" ] || options+=("--cpus-per-task=$((cpus * $1))")
    options+=(--export=ALL) # also after sbatch --export=...
    [ "${MEGAFUSION_CONTAINER:-none}" = enroot ] || return 0
    options+=("--container-image=${MEGAFUSION_CONTAINER_IMAGE:?}" "--container-workdir=$PWD")
    options+=("--container-mounts=$PWD:$PWD${MEGAFUSION_CONTAINER_MOUNTS:+,$MEGAFUSION_CONTAINER_MOUNTS}")
}
