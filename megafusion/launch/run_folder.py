"""Which folder a `megafusion train` command writes to: asked by the launchers' scripts, so it loads no torch.

python -m megafusion.launch.run_folder CONFIG [KEY=VALUE]... prints its absolute path.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from megafusion.errors import UserError, exit_on_user_error
from megafusion.storage import expand_path
from megafusion.yaml_values import load_values

# What SLURM and shells take literally: sbatch reads % in the names of its logs in its own way.
_PLAIN_PATH = re.compile(r"[\w@+=:,./-]+")


def run_folder(config: Path, overrides: Sequence[str]) -> Path:
    """The absolute path of a run's `out`. UserError where there is none, or none that scripts hand on."""
    out = load_values(config, overrides).get("out")
    if not isinstance(out, str) or not out:
        raise UserError(f"{config}: key 'out' is required: the run's folder")
    return plain_path(Path(out), "out")


def plain_path(path: Path, name: str) -> Path:
    """The absolute path. UserError where it has characters that sbatch or a shell might read."""
    path = Path(expand_path(path)).absolute()
    if not _PLAIN_PATH.fullmatch(str(path)):
        raise UserError(f"{name} {str(path)!r}: launchers take paths of letters, digits and @+=:,./_- only")
    return path


if __name__ == "__main__":
    with exit_on_user_error():
        print(run_folder(Path(sys.argv[1]), sys.argv[2:]))
