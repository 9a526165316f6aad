"""Judges pip-audit's report for `make audit`: 0 all audited, none vulnerable; 1 some are; 3 not all audited.

pip-audit itself ends with 0 and "No known vulnerabilities found" where the service knows none of the
packages, as where a mirror answers in its place.
"""

import json
import sys
from pathlib import Path


def main(report: Path) -> int:
    try:
        packages = json.loads(report.read_text())["dependencies"]
    except (OSError, ValueError, KeyError):
        print(
            "audit: nothing was audited: pip-audit could not be installed, or did not reach its service (the "
            "message is above); run it where the internet can be reached",
            file=sys.stderr,
        )
        return 3
    bad = [
        f"  {package['name']} {package['version']}: {found['id']}, fixed in "
        f"{', '.join(found['fix_versions']) or 'no version yet'}"
        for package in packages
        for found in package.get("vulns", ())
    ]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    audited = len(packages) - len(skipped)
    print(f"audit: {audited} of {len(packages)} packages audited; {len(bad)} known vulnerabilities")
    print("\n".join(bad), end="\n" if bad else "")
    if skipped:
        print(
            f"audit: the service does not know {len(skipped)} of them ({', '.join(skipped[:5])}, ...): "
            "does a mirror answer in its place? Run it where the service can be reached",
            file=sys.stderr,
        )
    return 1 if bad else 3 if skipped or not packages else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
