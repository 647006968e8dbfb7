"""Tables on a terminal: what has no room is left out by the column and said; a number is never cut."""

from collections.abc import Collection, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

NAME = 12  # characters that a column which may fold keeps, before another column is left out for it
Cell = str | Text


def print_table(
    console: Console,
    header: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    left: Collection[str],
    fold: Collection[str],
    words: Collection[str] = (),
    drop: Sequence[str] = (),
    gap: int = 0,
) -> None:
    """Print a table in the console's width.

    Args:
        console: Where.
        header: The columns' names.
        rows: The cells, as many as the header in each; a cell may have several lines.
        left: The columns that are aligned to the left.
        fold: Those that may be folded anywhere, such as names.
        words: Those that may be wrapped at spaces.
        drop: Those that may be left out, the first one first.
        gap: Spaces beside a column, more than the one between two.
    """
    texts = {name: [name, *(str(row[i]) for row in rows)] for i, name in enumerate(header)}
    needs = {name: _need(cells, name in fold, name in words) + 1 + gap for name, cells in texts.items()}
    shown, gone = list(header), list[str]()
    for name in drop:
        if name in shown and sum(needs[n] for n in shown) - 1 > console.width:
            shown.remove(name)
            gone.append(name)
    fits = sum(needs[n] for n in shown) - 1 <= console.width
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False)
    for name in shown:
        keep = fits and name not in (*fold, *words)  # else a number is wrapped at its space, which loses nothing
        grid.add_column(name, justify="left" if name in left else "right", overflow="fold", no_wrap=keep)
    for row in rows:
        cells = (Text(cell) if isinstance(cell, str) else cell for cell in row)
        grid.add_row(*(cell for name, cell in zip(header, cells, strict=True) if name in shown))
    console.print(grid)
    if gone:
        console.print(Text(f"no room for: {', '.join(gone)}"))


def _need(cells: Sequence[str], folds: bool, wraps: bool) -> int:
    """Return how many characters a column cannot do without."""
    parts = [part for cell in cells for part in (cell.split() if wraps else cell.split("\n"))]
    longest = max(map(len, parts), default=0)
    return min(longest, NAME) if folds else longest
