"""Tables of results, for a terminal and for Markdown alike, and the captions they need."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Number = int | float


@dataclass(frozen=True)
class Table:
    """A heading, rows of text and a caption that says where the numbers come from."""

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.heading):
                raise ValueError(
                    f"row {list(row)} must have {len(self.heading)} cells, one for each of "
                    f"{list(self.heading)}; use '' for an empty one"
                )

    def __str__(self) -> str:
        """Markdown that also reads well in a terminal: the first column left, others right."""
        lines = [self.heading, *self.rows]
        # Some readers of Markdown want three characters in a rule.
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        # A colon at the end aligns a column to the right, as _row does for a terminal.
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        text = "\n".join(_row(line, widths) for line in (self.heading, rule, *self.rows))
        return f"{text}\n\n{self.caption}\n" if self.caption else f"{text}\n"


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return f"| {' | '.join(padded)} |"


# A protocol: this wing knows no metrics, whose columns these are.
@runtime_checkable
class Column(Protocol):
    """How a table shows a number: its title, decimals, and the key of its standard error."""

    # Properties: what is only read may be a NamedTuple's field.
    @property
    def title(self) -> str: ...

    @property
    def decimals(self) -> int: ...

    @property
    def error(self) -> str: ...


def results_table(
    rows: Mapping[str, Mapping[str, Number]], columns: Mapping[str, Column], caption: str = ""
) -> Table:
    """Methods by what is known of them; a column that no method has is left out.

    Args:
        rows: method -> its numbers by key.
        columns: key -> how it is shown, in the order of the table.
    """
    shown = {key: column for key, column in columns.items() if any(key in r for r in rows.values())}
    body = [[name, *(_cell(row, *item) for item in shown.items())] for name, row in rows.items()]
    return Table(["method", *(column.title for column in shown.values())], body, caption)


def _cell(row: Mapping[str, Number], key: str, column: Column) -> str:
    if key not in row:  # an empty cell, not a zero: a fill has no calls to count
        return ""
    text = f"{row[key]:.{column.decimals}f}"
    # `error` may be empty, which no row has as a key.
    return f"{text} ± {row[column.error]:.{column.decimals}f}" if column.error in row else text


def provenance(command: str, data: str, seed: int, **more: object) -> str:
    """The caption of a table: what to run again to get its numbers, and the day they are from:
    today, unless `date` says another."""
    facts = {"data": data, "seed": seed, **more}
    facts.setdefault("date", time.strftime("%Y-%m-%d"))
    return f"`{command}`; " + ", ".join(f"{key} {value}" for key, value in facts.items())
