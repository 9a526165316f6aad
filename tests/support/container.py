"""A stand-in for Apptainer: a program of that name, and a Python that runs nowhere but below it."""

import os
import stat
import sys
from pathlib import Path

IN_THE_IMAGE = "INSIDE_OF_TEST_IMAGE"
APPTAINER = f"""\
[ -z "${IN_THE_IMAGE}" ] || {{ echo "apptainer in apptainer" >&2; exit 255; }}
[ "$1" = exec ] || exit 255
while [ "$1" != test.sif ]; do shift; done
shift
{IN_THE_IMAGE}=yes exec "$@"
"""


def make_image(folder: Path) -> dict[str, str]:
    """A site with a container: an `apptainer` that becomes the command, and a Python only in the image.

    Outside, python3 has this environment's packages: what DeepSpeed's launcher there needs.
    """
    program(folder / "bin/apptainer", APPTAINER)
    program(folder / "bin/python3", f'exec {sys.executable} "$@"\n')
    inside = program(
        folder / "image/python",
        f'[ -n "${IN_THE_IMAGE}" ] || {{ echo "no such file" >&2; exit 127; }}\nexec {sys.executable} "$@"\n',
    )
    return {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "MEGAFUSION_CONTAINER": "apptainer",
        "MEGAFUSION_CONTAINER_IMAGE": "test.sif",
        "MEGAFUSION_PYTHON": str(inside),
    }


def program(path: Path, lines: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/bash\n" + lines)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
