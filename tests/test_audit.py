"""What `make audit` makes of reports in the form of pip-audit 2.10.1."""

import json

import pytest

from tests.audit import main

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
