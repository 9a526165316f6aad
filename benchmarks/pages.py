"""Tables in pages of docs/ that a command writes."""

from pathlib import Path

from megafusion.errors import UserError
from megafusion.storage import write_file

DOCS = Path(__file__).parents[1] / "docs"
END = "<!-- end of table -->\n"


def replace_table(page: str, command: str, rows: str) -> str:
    """A page with other rows between the marks of a command's table."""
    begin = f"<!-- table: {command} -->\n"
    before, found, rest = page.partition(begin)
    _, end, after = rest.partition(END)
    if not (found and end):
        raise UserError(f"the lines {begin!r} and {END!r} of the table are gone; restore them")
    return before + begin + "\n" + rows + "\n" + end + after


def write_table(page: Path, command: str, rows: str) -> None:
    """The same with a file."""
    write_file(page, replace_table(page.read_text(), command, rows))
