"""What passes between the commands and people: tables, with rich on a terminal and plain columns elsewhere, and lines.

Owns the look only; it does not know what cells or lines mean. Invariant: piped output holds no control characters.
"""

import contextlib
import sys
from collections.abc import Collection, Iterator, Sequence

Row = Sequence[str]


def print_table(title: str, columns: Row, rows: Sequence[Row], numeric: Collection[int] = ()) -> None:
    """Print a table on stdout; columns whose index is in ``numeric`` are aligned right, the others left."""
    if sys.stdout.isatty():
        _print_rich(title, columns, rows, numeric)
        return
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    print(title)
    for row in (columns, *rows):
        cells = [cell.rjust(width) if i in numeric else cell.ljust(width)
                 for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        print(("  " + "  ".join(cells)).rstrip())


def number_text(value: float) -> str:
    """A figure for people: four significant digits, thousands marked, no exponent."""
    whole = len(str(int(abs(value))))
    return f"{value:,.{max(0, 4 - whole)}f}" if abs(value) >= 1 else f"{value:.4f}"


def on_terminal() -> bool:
    """True when a person types and reads here."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def input_lines() -> Iterator[str]:
    """Lines until the input ends: typed after a mark, with editing and history, or those of a pipe."""
    if not on_terminal():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and history
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def write_now(text: str) -> None:
    """Print a piece of text as it is, at once."""
    print(text, end="", flush=True)


def _print_rich(title: str, columns: Row, rows: Sequence[Row], numeric: Collection[int]) -> None:
    from rich.console import Console  # 60 ms, and only a terminal wants it
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)

