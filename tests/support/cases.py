"""The command line of the suites that are tables of named cases."""

import argparse
from collections.abc import Iterable


def chosen_cases(description: str | None, names: Iterable[str]) -> list[str]:
    """The cases named on the command line, or all; exits with the known names if one is not among them."""
    known = list(names)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="NAME", help=f"all without; of {', '.join(known)}")
    wanted = parser.parse_args().cases
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(known)}")
    return wanted or known
