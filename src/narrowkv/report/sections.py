"""What a report is made of: sections of text, tables and plots, which every kind of results makes from its file."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | float | int | None


@dataclass(frozen=True)
class Plot:
    """One plot with one message. name: of its file, without ending. caption: what is to be seen in it."""

    name: str
    caption: str
    figure: "Figure"


@dataclass(frozen=True)
class Table:
    """columns: headings with units. rows: elements stay elements, to be sorted. digits: after the point, by column."""

    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    digits: dict[str, int] = field(default_factory=dict)

    @property
    def numeric(self) -> list[bool]:
        """Which columns have only elements, and so are aligned right."""
        return [all(not isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))]

    def shown(self, row: list[Cell]) -> list[str]:
        """A row as text; None is a dash."""
        return [_shown(cell, self.digits.get(column, 2)) for column, cell in zip(self.columns, row, strict=True)]


@dataclass(frozen=True)
class Section:
    """title, text: plain sentences."""

    title: str
    text: str
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


def _shown(cell: Cell, digits: int) -> str:
    if cell is None:
        return "-"
    return f"{cell:,.{digits}f}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else cell
