"""What a person sees: the text on standard output; beside it, on standard error, a spinner, tables, units."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

KIND_NAMES = {
    "attention": "attention state",
    "sliding": "sliding attention state",
    "conv": "convolution state",
    "recurrent": "recurrent state",
    "clock": "lengths",
}


def console() -> Console:
    """A console on what standard error is now."""
    return Console(stderr=True, highlight=False)


@contextmanager
def spinner(what: str, show: bool = True) -> Iterator[None]:
    """Say what is going on for as long as it does, on a terminal only."""
    screen = console()
    if not (show and screen.is_terminal):
        yield
        return
    with screen.status(what):
        yield


def human_bytes(n: int) -> str:
    """1536 -> 1.5 KiB."""
    size, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{n} B" if unit == "B" else f"{size:.1f} {unit}"


def byte_rows(by_kind: Mapping[str, int], total: int) -> list[tuple[str, str]]:
    """A row of text for each kind of state that takes bytes, then one for all of them."""
    rows = [(KIND_NAMES.get(kind, kind), human_bytes(n)) for kind, n in by_kind.items() if n]
    return [*rows, ("all states", human_bytes(total))]


def two_columns(rows: list[tuple[str, str]]) -> Table:
    """A small table of names and right-aligned values."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def show(text: str) -> None:
    """Put text onto standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
