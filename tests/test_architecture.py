"""Rules of docs/architecture.md that the import contracts in pyproject.toml cannot express."""

import ast
from collections.abc import Iterator

from tests.support.small import ROOT

LIBRARY = ROOT / "megafusion"


def nodes(*rooms: str) -> Iterator[tuple[str, ast.AST]]:
    """Every syntax node of some rooms' files, each with its file and line."""
    for room in rooms:
        for path in sorted((LIBRARY / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def imported(node: ast.AST) -> list[str]:
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom(module=str(module)):
            return [f"{module}.{alias.name}" for alias in node.names]
    return []


def test_what_runs_on_one_device_imports_nothing_distributed():
    found = [
        where
        for where, node in nodes("model", "objective", "sequence", "images", "data")
        if any(name.startswith("torch.distributed") for name in imported(node))
    ]
    assert found == []


def test_only_training_and_commands_know_a_whole_run():
    rooms = {path.name for path in LIBRARY.iterdir() if path.is_dir()} - {"train", "commands"}
    found = [
        where
        for where, node in nodes(*rooms)
        if any(name.endswith(".RunConfig") for name in imported(node))
        or (isinstance(node, ast.Name) and node.id == "RunConfig")
    ]
    assert found == []


def test_no_method_of_another_object_is_overwritten():
    found = [
        where
        for where, node in nodes(".")
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and target.attr in ("forward", "step", "__call__")
        if not (isinstance(target.value, ast.Name) and target.value.id == "self")
    ]
    assert found == []


def test_every_package_is_one():
    """A folder of modules without __init__.py is not installed, and no contract sees it."""
    for package in (LIBRARY, ROOT / "data_prep", ROOT / "kernels/interval_attention"):
        folders = {path.parent for path in package.rglob("*.py")}
        assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_a_docstring_begins_with_a_verb_or_the_name_of_a_thing():
    rooms = [ROOT / name for name in ("megafusion", "data_prep", "kernels", "tests", "benchmarks")]
    files = [path for room in rooms for path in sorted(room.rglob("*.py"))]
    found = [str(path.relative_to(ROOT)) for path in files if '"""' + "What " in path.read_text()]
    assert found == []
