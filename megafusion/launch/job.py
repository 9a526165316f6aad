"""The job script: launchers/slurm/train.sbatch with a run's options and values in it."""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from megafusion.errors import UserError
from megafusion.launch.site import CONTAINERS, Site

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "launchers" / "slurm" / "train.sbatch"
MARKER = "# -- megafusion launch puts options and values here --\n"

_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")


@dataclass(frozen=True)
class Job:
    """What a job of a run needs to know, checked."""

    run: Path
    """Run folder, absolute and plain."""
    site: Site
    nodes: int
    launcher: str
    time: str | None
    """Time limit in sbatch's form; None for the site's."""

    submission: str
    """Names this submission among the run's: a job reads its files again at each of its starts."""

    @property
    def config(self) -> Path:
        """The frozen configuration of this submission."""
        return self.run / "launch" / self.submission / "config.yaml"

    @property
    def script(self) -> Path:
        return self.config.with_name("train.sbatch")

    @property
    def world_size(self) -> int:
        return self.nodes * self.site.ranks_per_node

    @property
    def name(self) -> str:
        """The job's name, one for each run: SLURM runs one job of a name at a time."""
        return "megafusion:" + str(self.run).strip("/").replace("/", ":")


def render(job: Job) -> str:
    """The script, for sbatch. No value of a configuration is in it: it names the frozen file."""
    if job.time is not None and not _TIME.fullmatch(job.time):
        raise UserError(f"--time {job.time!r}: write minutes, H:MM:SS or D-HH:MM:SS")
    options = job.site.options | ({"time": job.time} if job.time else {})
    options |= {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.site.ranks_per_node),
        "output": f"{job.run}/logs/job-%j.log",
    }
    # In a container ours is not there: python3 is the image's.
    in_container = job.site.environment.get("MEGAFUSION_CONTAINER", CONTAINERS[0]) != CONTAINERS[0]
    values = {"MEGAFUSION_PYTHON": "python3" if in_container else sys.executable} | job.site.environment
    values |= {
        "MEGAFUSION_ROOT": str(ROOT),
        "MEGAFUSION_RUN": str(job.run),
        "MEGAFUSION_LAUNCHER": job.launcher,
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in sorted(options.items())]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(values.items())]
    lines += ["unset MEGAFUSION_SITE", f"set -- {shlex.quote(str(job.config))}"]
    before, marker, after = TEMPLATE.read_text().partition(MARKER)
    assert marker, f"{TEMPLATE}: the line {MARKER!r} is gone"
    return before + "\n".join(lines) + "\n" + after
