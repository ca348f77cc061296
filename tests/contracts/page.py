"""Pages of contracts: what is asked, what mlfs does, and why. Their rows live in the tests that hold them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "contracts"


def page(introduction: str, sections: Iterable[tuple[str, Sequence[str], Iterable[Sequence[str]]]], module: str) -> str:
    """Writes a page: sections of a title, the heads of the columns, and rows.

    Args:
        introduction: title and what holds for all rows.
        module: the test module that has the rows and, run as a program, writes the page.
    """
    lines = [introduction.strip(), ""]
    for title, heads, rows in sections:
        lines += [f"## {title}", _line(heads), _line("---" for _ in heads)]
        lines += [_line(cell.replace("|", r"\|") for cell in row) for row in rows]
        lines.append("")
    lines.append(f"`python -m {module}` writes this page from the rows that the test checks.")
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def check(name: str, text: str) -> None:
    """Fails unless docs/contracts/NAME.md is `text`."""
    found = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert found == text, f"docs/contracts/{name}.md is not what its test says: write it anew, as its last line says"


def write(name: str, text: str) -> None:
    """Writes docs/contracts/NAME.md."""
    (FOLDER / f"{name}.md").write_text(text, encoding="utf-8")
