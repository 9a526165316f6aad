"""Site files: sbatch's options on a cluster, and the environment of every process there.

python -m megafusion.launch.site FILE prints the environment as KEY=VALUE lines, for DeepSpeed's launcher.
"""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from megafusion.errors import UserError, exit_on_user_error
from megafusion.processes import RANK_VARIABLES
from megafusion.storage import expand_path, read_text

SITES = Path(__file__).parents[2] / "launchers" / "sites"

# Options of sbatch that a site may set; the job sets the others.
SBATCH_OPTIONS = (
    "account, constraint, cpus-per-task, exclude, exclusive, gpus-per-node, gres, mem, nodelist, partition, "
    "qos, reservation, signal, time"
)
LAUNCHERS = ("srun", "deepspeed")
CONTAINERS = ("none", "apptainer", "enroot")

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION_VALUE = re.compile(r"[\w@%+=:,./\[\]-]+")
# A whole word of the name must match: NCCL_IB_PKEY and TOKENIZERS_PARALLELISM do not.
_SECRET = re.compile(r"(^|_)(API)?(KEY|TOKEN|SECRET|PASSWORD|PASSWD)S?(_|$)", re.IGNORECASE)
# Set by the job for every process.
_RESERVED = (*RANK_VARIABLES, "MEGAFUSION_RUN", "MEGAFUSION_ROOT", "MEGAFUSION_START")


@dataclass(frozen=True)
class Site:
    """The validated values of a site file."""

    options: dict[str, str]
    """sbatch's options, without dashes."""
    environment: dict[str, str]
    """Environment variables of every process."""
    ranks_per_node: int
    launcher: str

    @classmethod
    def load(cls, name: str) -> "Site":
        """Read launchers/sites/NAME.env, or a file by its path. Raises UserError with file and line."""
        is_path = "/" in name or name.endswith(".env")
        path = Path(expand_path(name)) if is_path else SITES / f"{name}.env"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in SITES.glob("*.env")))
            raise UserError(f"{path}: no such site file; there are {known}: copy example.env and fill it in")
        options, environment = {}, {}
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if not (pair := _pair(line, f"{path}:{number}")):
                continue
            key, value = pair
            if key.startswith("SBATCH_"):
                options[_option(key, value, f"{path}:{number}")] = value
            else:
                environment[key] = value
        _check_container(path, environment)
        key, num_ranks = "MEGAFUSION_RANKS_PER_NODE", environment.get("MEGAFUSION_RANKS_PER_NODE", "")
        if not num_ranks.isdecimal() or int(num_ranks) == 0:
            raise UserError(
                f"{path}: {key} is required, a number such as the GPUs of a node (got {num_ranks!r})"
            )
        launcher = environment.get("MEGAFUSION_LAUNCHER", LAUNCHERS[0])
        check_launcher(launcher, f"{path}: MEGAFUSION_LAUNCHER")
        return cls(options, environment, int(num_ranks), launcher)


def _pair(line: str, where: str) -> tuple[str, str] | None:
    """Key and value of a line; None for a comment or an empty line."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise UserError(f"{where}: {error}; quote values as in a shell") from error
    if not words:
        return None
    key, equals, value = words[0].partition("=")
    if len(words) > 1 or not equals or not _KEY.fullmatch(key):
        raise UserError(f"{where}: {line!r} is not of the form KEY=VALUE; quote values with spaces")
    # A shell that sources the file, as in `sbatch launchers/slurm/train.sbatch`, would expand them.
    if bad := next((c for c in "$`\\\n" if c in value), None):
        raise UserError(f"{where}: {bad!r} in the value of {key}; nothing but ~ is expanded: write it out")
    if value.startswith("~") and re.match(rf"\s*{key}=~", line):  # as a shell does
        value = expand_path(value)
    elif value.startswith("~") or ":~" in value:
        raise UserError(
            f"{where}: ~ in the value of {key} is expanded at its start, without quotes; write it out"
        )
    if key == "MEGAFUSION_MAX_STARTS":
        raise UserError(f"{where}: {key} was replaced by the run's key resilience.max_crashes; remove it")
    if key in _RESERVED:
        is_address = key == "MASTER_ADDR"
        way_out = "; name the first node's address in MEGAFUSION_MASTER_ADDR" if is_address else ""
        raise UserError(f"{where}: {key} is set by the launcher{way_out}")
    if _SECRET.search(key):
        raise UserError(
            f"{where}: {key} looks like a secret, and a site's values are written into job scripts: "
            "export it in the shell that you submit from, which sbatch passes on (with deepspeed.sh, log in "
            "on the machines, as by `wandb login`)"
        )
    return key, value


def _option(key: str, value: str, where: str) -> str:
    option = key.removeprefix("SBATCH_").lower().replace("_", "-")
    if option not in SBATCH_OPTIONS.split(", "):
        raise UserError(f"{where}: {key}: a site sets {SBATCH_OPTIONS}, and not {option}")
    if not _OPTION_VALUE.fullmatch(value):
        raise UserError(f"{where}: {value!r} is not a valid value of sbatch's --{option}")
    return option


def check_launcher(value: str, origin: str) -> None:
    """Raise UserError unless a value names a launcher."""
    if value not in LAUNCHERS:
        raise UserError(f"{origin} is {' or '.join(LAUNCHERS)}, not {value!r}")


def _check_container(path: Path, environment: dict[str, str]) -> None:
    kind = environment.get("MEGAFUSION_CONTAINER", CONTAINERS[0])
    if kind not in CONTAINERS:
        raise UserError(f"{path}: MEGAFUSION_CONTAINER is {', '.join(CONTAINERS)}; not {kind!r}")
    if kind != CONTAINERS[0] and not environment.get("MEGAFUSION_CONTAINER_IMAGE"):
        raise UserError(f"{path}: MEGAFUSION_CONTAINER={kind} needs MEGAFUSION_CONTAINER_IMAGE")


if __name__ == "__main__":
    with exit_on_user_error():
        for name, value in Site.load(sys.argv[1]).environment.items():
            print(f"{name}={value}")
