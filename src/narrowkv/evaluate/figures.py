"""How a figure of a page is computed from the rows of files of results: plain data, of which nothing is evaluated."""

import itertools
import math
import operator
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from narrowkv.errors import FileFormatError


def mean(values: Sequence[float]) -> float:
    """The geometric mean; one element is its own. Raises FileFormatError for elements that are not positive."""
    require(len(values) == 1 or min(values) > 0, "a geometric mean is of positive elements alone", "choose another summary")
    return values[0] if len(values) == 1 else statistics.geometric_mean(values)


EACH = "each"
SUMMARIES: dict[str, Callable[[Sequence[float]], float]] = {
    "geometric mean": mean,
    "least": min,
    "most": max,
    "sum": sum,
}
RELATIONS: dict[str, Callable[[float, float], float]] = {"over": operator.truediv, "less": operator.sub}
CELLS: dict[str, tuple[type, Any]] = {"run": (str, None), "rows": (dict, {}), "field": (str, None), "within": (dict, {})}
PAIRS: dict[str, tuple[type, Any]] = dict.fromkeys(RELATIONS, (dict, None))
SETTINGS: dict[str, tuple[type, Any]] = {
    "how": (str, "geometric mean"),
    "format": (str, ".2f"),
    "unit": (float, 1.0),
    "tolerance": (float, 0.0),
    "tolerance_here": (float, 0.0),
    "here": (bool, True),
}
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Cells:
    """Entries of rows of a run's file: one for every choice from the lists in `rows`.

    rows: entries by which a row is found. within: lists in it, and entries of the one element that is looked into.
    """

    run: str
    rows: Mapping[str, Any]
    field: str
    within: Mapping[str, Mapping[str, Any]]

    def values(self, results: Mapping[str, Rows]) -> list[float | None]:
        """The entries, None where there is no such row; raises FileFormatError for several such, or what is no number."""
        return [self._value(results[self.run], wanted) for wanted in _choices(self.rows)]

    def _value(self, rows: Rows, wanted: Mapping[str, Any]) -> float | None:
        found = _find(rows, wanted)
        for name, entries in self.within.items():
            inner = found and found.get(name)
            found = _find(inner, entries) if isinstance(inner, list) else None
        if found is None:
            return None
        value = found.get(self.field)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise FileFormatError(f"{self.field!r} of {dict(wanted)} in the run {self.run} is no number; measure again.")
        return float(value)


@dataclass(frozen=True)
class Term:
    """Entries; or their relation, a key of RELATIONS, to others, one by one."""

    cells: Cells
    relation: str | None = None
    others: Cells | None = None

    def values(self, results: Mapping[str, Rows]) -> list[float | None]:
        """One for each entry, None where it or the other is missing; raises FileFormatError where they are not as many."""
        found = self.cells.values(results)
        if self.relation is None or self.others is None:
            return found
        others = self.others.values(results)
        require(len(found) == len(others), f"{len(found)} and {len(others)} entries of {self.cells.run} do not make pairs")
        require(self.relation != "over" or 0 not in others, f"a figure of {self.cells.run} is divided by zero")
        relate = RELATIONS[self.relation]
        return [None if None in (a, b) else relate(a, b) for a, b in zip(found, others, strict=True)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Figure:
    """What a page states: a summary of terms, or each of them.

    how: a key of SUMMARIES, or EACH. unit: what one counts in, such as 2^30 bytes. tolerance, tolerance_here: how far,
    relative to what is claimed, a replay of the command and of its short form may be. here: whether the short form has it.
    """

    terms: tuple[Term, ...]
    how: str
    format: str
    unit: float
    tolerance: float
    tolerance_here: float
    here: bool

    def runs(self) -> set[str]:
        """Names of the runs that it is computed from."""
        return {cells.run for term in self.terms for cells in (term.cells, term.others) if cells is not None}

    def values(self, results: Mapping[str, Rows]) -> list[float | None]:
        """The figure, or each of them; None where a row is missing."""
        found = [value if value is None else value / self.unit for term in self.terms for value in term.values(results)]
        if self.how == EACH:
            return found
        known = [value for value in found if value is not None]
        return [SUMMARIES[self.how](known) if known and len(known) == len(found) else None]

    def shown(self, value: float) -> str:
        """As a page writes it."""
        return format(value, self.format)


def deviation(claimed: float, found: float) -> float:
    """How far two differ, relative to the first; infinite from zero."""
    if claimed == found:
        return 0.0
    return abs(found - claimed) / abs(claimed) if claimed else math.inf


def read_figure(where: str, found: Any, tolerances: Mapping[str, float]) -> Figure:
    """A figure from plain data; each of its `terms`, and what follows `over` or `less`, takes from it what it does not say.

    where: how messages name it. tolerances: those of its claim. Raises FileFormatError for what is no figure.
    """
    usual = SETTINGS | {name: (float, value) for name, value in tolerances.items()}
    fields = entries(where, found, {}, {**usual, **CELLS, **PAIRS, "terms": (list, [{}])})
    require(fields["how"] in (*SUMMARIES, EACH), f"{where} is summarized in an unknown way, {fields['how']!r}")
    require(
        re.fullmatch(r",?(\.[0-9])?[f%]", fields["format"]), f"{where} has the format {fields['format']!r}, not one like .2f"
    )
    require(fields["unit"] > 0 and fields["terms"], f"{where} has no unit or no terms")
    terms = tuple(_read_term(where, fields, term) for term in fields["terms"])
    return Figure(terms, **{name: fields[name] for name in SETTINGS})


def _read_term(where: str, figure: Mapping[str, Any], found: Any) -> Term:
    """A term; what it does not say is the figure's."""
    entries(where, found, {}, {**CELLS, **PAIRS})
    pairs = {name: found.get(name, figure[name]) for name in PAIRS}
    cells = _changed(where, {name: figure[name] for name in CELLS}, {name: found[name] for name in CELLS if name in found})
    require(cells["run"] and cells["field"], f"{where} lacks a run or a field")
    related = [(name, Cells(**_changed(where, cells, changes))) for name, changes in pairs.items() if changes is not None]
    require(len(related) <= 1, f"{where} has both {' and '.join(PAIRS)}")
    return Term(Cells(**cells), *(related[0] if related else ()))


def entries(
    where: str, found: Any, required: Mapping[str, type], optional: Mapping[str, tuple[type, Any]] | None = None
) -> dict[str, Any]:
    """An object's entries, with defaults; raises FileFormatError for one that is missing, unknown or of another type."""
    optional = optional or {}
    kinds = {**required, **{name: kind for name, (kind, _) in optional.items()}}
    require(isinstance(found, dict), f"{where} is no object")
    require(found.keys() <= kinds.keys(), f"{where} has unknown entries, {', '.join(sorted(found.keys() - kinds.keys()))}")
    require(required.keys() <= found.keys(), f"{where} lacks {', '.join(sorted(required.keys() - found.keys()))}")
    for name, value in found.items():
        accepted = (int, float) if kinds[name] is float else kinds[name]
        fits = isinstance(value, accepted) and (kinds[name] is bool or not isinstance(value, bool))
        require(fits and value == value, f"{name!r} of {where} is no {kinds[name].__name__}")
    return {name: default for name, (_, default) in optional.items()} | found


def require(condition: Any, what: str, remedy: str = "write results/claims.json as CONTRIBUTING.md says") -> None:
    """Raise FileFormatError with the cause and the remedy unless the condition holds."""
    if not condition:
        raise FileFormatError(f"{what[:1].upper()}{what[1:]}; {remedy}.")


def _changed(where: str, base: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    """The fields of Cells with changes; those of `rows` and `within` entry by entry."""
    given = entries(where, changes, {}, {name: (kind, base[name]) for name, (kind, _) in CELLS.items()})
    fields = given | {name: {**base[name], **given[name]} for name in ("rows", "within")}
    require(
        all(isinstance(inner, dict) for inner in fields["within"].values()), f"{where} looks into what is no list of objects"
    )
    return fields


def _choices(rows: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every choice of one from each list."""
    lists = [value if isinstance(value, list) else [value] for value in rows.values()]
    return (dict(zip(rows, chosen, strict=True)) for chosen in itertools.product(*lists))


def _find(rows: Sequence[Any], wanted: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The one row that has these entries, or None; raises FileFormatError where several do."""
    found = [row for row in rows if isinstance(row, dict) and all(row.get(name) == value for name, value in wanted.items())]
    require(len(found) <= 1, f"{len(found)} rows of results have {dict(wanted)}", "say more of the one that is meant")
    return found[0] if found else None
