"""What `fedsim compare` prints: the overview, a table per metric, accuracy at equal cost, and the cost of a target."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim_analysis.comparison.budgets import RESOURCES, at_equal, to_target
from fedsim_analysis.comparison.grouping import Comparison, collect
from fedsim_analysis.comparison.metrics import METRICS, named
from fedsim_analysis.comparison.overview import overview, readable, tell
from fedsim_analysis.comparison.printed import forms, remarks, sheets
from fedsim_analysis.comparison.printed.cells import ROW
from fedsim_analysis.comparison.printed.naming import Naming
from fedsim_analysis.comparison.tables import DEFAULT, groups, paired
from fedsim_analysis.foreign_text import no_formula, printable

FORMS = (*forms.FORMS, "csv")
TABLES = ("overview", "metrics", "equal", "target")
SCORE = "accuracy"
SUCH_AS = {"--at-clock": "600 or 600s", "--at-energy": "500J or 3kJ"}
AMOUNT = re.compile(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kKMGTPE]?)(?:B|FLOPs?|s|J)?")


def text(
    runs: Sequence[str | Path],
    form: str = "terminal",
    *,
    tables: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    baseline: str | None = None,
    sort: str | None = None,
    target: float | None = None,
    budgets: Mapping[str, float | None] | None = None,
    score: str = SCORE,
    width: int | None = None,
) -> str:
    """The tables of these run files in one of FORMS.

    tables: of TABLES; None: all that have something to compare. metrics: of METRICS, or columns of /rounds, as "train_loss:min".
    baseline, sort: see `pairs.wanted` and `collect`. target: of the score, which is the column of /rounds that counts as accuracy.
    budgets: by the names in `budgets.RESOURCES`. width: of the terminal; None: lines as long as they are. Raises FileNotFoundError, and
    ValueError with a message for the user.
    """
    _check(form, tables or (), target, budgets or {})
    found = collect(runs, metrics=[*(metrics or ()), score], sort=sort)
    _check_columns(found, metrics or (), score)
    chosen = list(dict.fromkeys(metrics or ()) or (name for name in DEFAULT if _has(found, name)))
    makers = {
        "overview": lambda: overview(found),
        "metrics": lambda: measured(found, chosen, baseline),
        "equal": lambda: at_equal(found, budgets, baseline, score),
        "target": lambda: to_target(found, target, score),
    }
    frames = {name: makers[name]() for name in TABLES if name in (tables or _telling(found)) and (chosen or name != "metrics")}
    if not frames:
        raise ValueError("--table metrics: nothing was measured in these runs yet")
    return csv(frames) if form == "csv" else _printed(Naming(found, frames.keys()), frames, form, width)


def _printed(naming: Naming, frames: Mapping[str, pd.DataFrame], form: str, width: int | None) -> str:
    if form == "terminal":
        return _terminal(naming, frames, width)
    return forms.FORMS[form](sheets.of(naming, frames), remarks.of(naming, frames))


def _terminal(naming: Naming, frames: Mapping[str, pd.DataFrame], width: int | None) -> str:
    """The overview as `tell` has it, with its own legend, and the other tables below."""
    rest = {name: frame for name, frame in frames.items() if name != "overview"}
    parts = [fitted(naming, frames["overview"], width)] if "overview" in frames else []
    if rest:
        parts.append(forms.terminal(sheets.of(naming, rest), remarks.of(naming, rest), width))
    return "\n\n".join(parts)


def fitted(naming: Naming, table: pd.DataFrame, width: int | None) -> str:
    """`tell`, with numbers of the rows; of a table that is wider than `width` the columns that do not fit stand below."""
    text, _, legend = tell(table).partition("\n\n")
    if how := remarks.drawn(naming.comparison):
        legend = f"{legend}\n{how}"
    shown = readable(table)
    if naming.numbered:
        shown.insert(0, ROW, range(1, len(shown) + 1))
        text = shown.to_string(index=False)
    if width is None or max(map(forms.cells_of, text.splitlines())) <= width:
        return f"{text}\n\n{legend}"
    return forms.terminal([sheets.readable_sheet(shown)], [legend], width)


def _check(form: str, tables: Sequence[str], target: float | None, budgets: Mapping[str, float | None]) -> None:
    if form not in FORMS:
        raise ValueError(f"--form {form}: fedsim compare prints {', '.join(FORMS)}")
    if wrong := [name for name in tables if name not in TABLES]:
        raise ValueError(f"--table {wrong[0]}: there is no such table; there are: {', '.join((*TABLES, 'all'))}")
    if wrong := [name for name in budgets if name not in RESOURCES]:
        raise ValueError(f"there is no budget of {wrong[0]}; there are: {', '.join(RESOURCES)}")
    if target is not None and not 0 < target <= 1:
        raise ValueError(f"--target {target:g}: an accuracy is a share above 0 and at most 1, such as 0.9")
    for name, value in budgets.items():
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"--at-{name} {value:g}: should be a number above 0")


def _check_columns(found: Comparison, metrics: Iterable[str], score: str) -> None:
    there = sorted({name for group in found.groups for run in group.runs for name in run.names})
    for name in metrics:
        if missing := [column for column in named(name).columns if column not in there]:
            known = ", ".join([*METRICS, *(printable(column) for column in there if column not in METRICS)])
            raise ValueError(f"--metric {name}: no run has a column {missing[0]}; there are: {known}")
    scores = [name for name in there if "accuracy" in name]
    if score != SCORE and score not in scores:
        raise ValueError(f"--score {score}: no run has such an accuracy; there are: {', '.join(map(printable, scores)) or 'none'}")


def _telling(found: Comparison) -> Sequence[str]:
    """Of one group nothing is at equal cost."""
    return TABLES if len(found.groups) > 1 else [name for name in TABLES if name != "equal"]


def _has(found: Comparison, name: str) -> bool:
    """Whether some run has a number for the metric."""
    return any(not np.isnan(METRICS[name].of(run)) for group in found.groups for run in group.runs)


def measured(found: Comparison, metrics: Sequence[str], baseline: str | None = None) -> pd.DataFrame:
    """`groups` and `paired` side by side."""
    alone, held = groups(found, metrics), paired(found, metrics, baseline)
    return alone.join(held[[name for name in held if name not in alone]])


def csv(frames: Mapping[str, pd.DataFrame]) -> str:
    """All numbers unrounded. Of several kinds of tables one below the other, under `table`; the overview is then left out, for its
    numbers are metrics. A text that a spreadsheet would compute has a ' before it."""
    chosen = {name: frame for name, frame in frames.items() if name != "overview" or len(frames) == 1}
    whole = pd.concat([_whole(frame.assign(table=name) if len(chosen) > 1 else frame) for name, frame in chosen.items()], ignore_index=True)
    if "table" in whole:
        whole.insert(0, "table", whole.pop("table"))
    return str(whole.map(_inert).rename(columns=_inert).to_csv(index=False)).rstrip()


def _whole(frame: pd.DataFrame) -> pd.DataFrame:
    """With counts that stay whole numbers where another table has none."""
    return frame.astype({name: "Int64" for name in frame if pd.api.types.is_integer_dtype(frame[name])})


def _inert(value: Any) -> Any:
    if isinstance(value, list):
        value = str(value)
    if not isinstance(value, str):
        return value
    return no_formula(printable(value))


def amount(given: str, option: str) -> float:
    """A number of bytes, FLOPs, seconds or joules as people write it: "9.75MB", "1.2e9", "3 GFLOP". ValueError for anything else."""
    found = AMOUNT.fullmatch(given.strip())
    try:
        number = float(found[1]) if found else np.nan
    except ValueError:
        number = np.nan
    if not found or np.isnan(number):
        raise ValueError(f"{option} {given}: should be a number, such as {SUCH_AS.get(option, '5e6, 5MB or 2GFLOP')}")
    power = ("", "K", "M", "G", "T", "P", "E").index(found[2].upper())
    return number * 1000.0**power
