"""SECURITY.md's claims about our sources: where pickle is read, and that no string becomes a command."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for room in ("megafusion", "data_prep", "kernels") for path in (ROOT / room).rglob("*.py")
)
# Reads a checkpoint's list of tensors, with names of types that it knows and no others.
READS_PICKLE = {"megafusion/checkpoint/tensor_list.py"}
FORBIDDEN = {
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "eval",
    "exec",
    "yaml.load",
    "yaml.unsafe_load",
}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword_is_true(call: ast.Call, name: str) -> bool:
    return any(word.arg == name and ast.unparse(word.value) != "False" for word in call.keywords)


def test_no_source_runs_what_data_or_configuration_say():
    assert len(SOURCES) > 80
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno} {name}"
        for path in SOURCES
        for name, call in calls(path)
        if (name in FORBIDDEN and not (name == "torch.load" and keyword_is_true(call, "weights_only")))
        or keyword_is_true(call, "shell")
        or keyword_is_true(call, "allow_pickle")
    ]
    assert found == []


def test_pickle_is_imported_in_one_place():
    found = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(name.name in ("pickle", "dill") for name in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill"))
    }
    assert found == READS_PICKLE
