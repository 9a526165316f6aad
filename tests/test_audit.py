"""`make audit` reads reports in the format of pip-audit 2.10.1."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.audit import main

ROOT = Path(__file__).parents[1]

SOUND = {"name": "rich", "version": "15.0.0", "vulns": []}
VULNERABLE = {
    "name": "jinja2",
    "version": "2.4.1",
    "vulns": [{"id": "PYSEC-2019-217", "fix_versions": ["2.10.1"], "aliases": [], "description": "..."}],
}
UNKNOWN = {
    "name": "torch",
    "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)",
}


@pytest.mark.parametrize(
    ("packages", "status", "said"),
    [
        ([SOUND], 0, "1 of 1 packages audited; 0 known vulnerabilities"),
        ([SOUND, VULNERABLE], 1, "jinja2 2.4.1: PYSEC-2019-217, fixed in 2.10.1"),
        ([SOUND, UNKNOWN], 3, "does not know 1 of them (torch, ...)"),
        ([UNKNOWN, VULNERABLE], 1, "does not know 1 of them"),
        ([], 3, "0 of 0 packages audited"),
    ],
)
def test_a_report_is_judged_by_what_was_audited(tmp_path, capsys, packages, status, said):
    report = tmp_path / "audit.json"
    report.write_text(json.dumps({"dependencies": packages, "fixes": []}))
    assert main(report) == status
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_no_report_is_no_pass(tmp_path, capsys):
    assert main(tmp_path / "missing.json") == 3
    assert "nothing was audited" in capsys.readouterr().err


# The report that is missing, above, stands for an installation that fails.
@pytest.mark.full
def test_make_audit_says_so_where_pip_audit_cannot_be_installed(tmp_path):
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "tests/audit.py", tmp_path / "tests")
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    offline = {
        "PIP_INDEX_URL": nobody,
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
    }
    done = subprocess.run(
        ["make", "audit", f"PYTHON={sys.executable}"],
        cwd=tmp_path,
        env=os.environ | offline | {"PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2  # make's own, as SECURITY.md says
    assert "No matching distribution" in done.stderr
    assert "nothing was audited: pip-audit could not be installed" in done.stderr
    assert "Error 3" in done.stderr
