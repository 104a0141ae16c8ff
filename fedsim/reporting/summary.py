"""The summary of a run file that a person reads: what ran, how it went, what it cost and where the time went."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedsim.errors import BadInput
from fedsim.reporting.bottleneck import beside, bottleneck
from fedsim.reporting.formatting import duration, quantity, share
from fedsim.storage.reader import RunReader

Array = NDArray[np.float64]
LINES = 12  # rounds shown at most
MOST_ANSWERS = 10_000_000  # clients times rounds, up to which it is counted who has answered
NAME = 40  # letters of a name of a client, at most
SERVER, MEMORY = "server_flops_", "memory_"  # how the columns of terms begin


def show(path: str | Path, console: Console) -> None:
    """Prints the summary of the run file at `path`, also while it grows. Raises BadInput for what is no run file."""
    run = RunReader(path, time.sleep).held()
    with np.errstate(all="ignore"):  # a value that was recorded may be any
        _show(run, console)


def _show(run: RunReader, console: Console) -> None:
    _headline(run, console)
    if run.rounds < 0:
        console.print("no round is complete yet")
        return
    clients, damaged = _clients(run)
    for table in (_rounds(run), _facts(_totals(run) + clients), _facts(_timing(run))):
        if table.row_count:
            console.print()
            console.print(table)
    if found := bottleneck(run):
        console.print(Text.assemble(("\nnext bottleneck  ", "dim"), found), soft_wrap=True)
    for line in [*run.damaged, *damaged]:
        console.print(Text(f"left out: {line}", "yellow"), soft_wrap=True)


def _headline(run: RunReader, console: Console) -> None:
    known = run.attributes
    done, planned = max(known["rounds"], 0), known.get("rounds_planned", "?")
    state = Text("finished", "green") if known["finished"] else Text(f"not finished: {done} of {planned} rounds", "yellow")
    console.print(Text.assemble((run.path.name, "bold"), "  ", state))
    ranks, hosts = known.get("ranks", 1), known.get("hosts", "")
    console.print(
        f"{known.get('method', '?')}, seed {known.get('seed', '?')}, {planned} rounds, {len(run.labels('client')):,} clients",
        highlight=False,
        markup=False,
    )
    where = f"{ranks} rank{'s' if ranks != 1 else ''}" + (f" on {hosts}" if hosts else "")
    since = str(known.get("started_at", "?")).replace("T", " ")
    console.print(f"{where}, since {since}, fedsim {known.get('fedsim_version', '?')}", style="dim", highlight=False, markup=False)
    if mended := known.get("mended"):
        console.print(Text(f"mended by fedsim doctor; this was lost: {mended}", "yellow"), soft_wrap=True)


SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "accuracy": ("accuracy", share),
    "client_accuracy": ("of clients", share),
    "loss": ("loss", lambda value: f"{value:.3f}" if np.isfinite(value) else "-"),
    "train_loss": ("train loss", lambda value: f"{value:.3f}" if np.isfinite(value) else "-"),
    "density": ("density", lambda value: f"{value:.3g}" if np.isfinite(value) else "-"),
    "bytes": ("sent", lambda value: quantity(value, "B")),
    "seconds": ("seconds", lambda value: f"{value:.3g}" if np.isfinite(value) else "-"),
}


def _rounds(run: RunReader) -> Table:
    """The first, every k-th and the last round; where some were evaluated, those."""
    columns = {name: run.column(name) for name in run.names() if name in SHOWN}
    columns["bytes"] = _bytes(run)
    table = Table(box=None, header_style="bold", pad_edge=False)
    shown = [name for name in SHOWN if name in columns and np.isfinite(columns[name]).any()]
    for title in ("round", *(SHOWN[name][0] for name in shown)):
        table.add_column(title, justify="right")
    for r in _chosen(columns.get("accuracy", np.full(run.rounds + 1, np.nan))):
        table.add_row(str(r), *(SHOWN[name][1](columns[name][r]) for name in shown))
    return table


def _chosen(accuracy: Array) -> list[int]:
    """At most LINES rounds, evenly spread over those with an accuracy, with the first and the last of all."""
    last = len(accuracy) - 1
    candidates = np.flatnonzero(np.isfinite(accuracy)) if np.isfinite(accuracy).any() else np.arange(last + 1)
    spread = candidates[np.linspace(0, len(candidates) - 1, min(LINES, len(candidates))).round().astype(int)]
    return sorted({0, *spread.tolist(), last})


def _bytes(run: RunReader) -> Array:
    """(rounds + 1,) sent up and down."""
    sent = np.zeros(run.rounds + 1)
    for name in {"bytes_up", "bytes_down"}.intersection(run.names()):
        sent += np.nan_to_num(run.column(name))
    return sent


def _facts(rows: list[tuple[str, ...]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    return table


def _totals(run: RunReader) -> list[tuple[str, ...]]:
    """What the whole run cost, and its dearest client."""
    has = {name: column for name in run.names() if np.isfinite(column := run.column(name)).any()}
    rows: list[tuple[str, ...]] = []
    if {"bytes_up", "bytes_down"} <= has.keys():
        up, down = np.nansum(has["bytes_up"]), np.nansum(has["bytes_down"])
        rows.append(("sent over the air", f"{quantity(up + down, 'B')}: {quantity(up, 'B')} up, {quantity(down, 'B')} down"))
    if "train_flops" in has:
        rows.append(("training", quantity(np.nansum(has["train_flops"]), "FLOP")))
    rows += _server(has)
    if np.isfinite(has.get("max_client_flops", np.empty(0))[1:]).any():
        rows.append(("busiest client", quantity(_most(has["max_client_flops"][1:]), "FLOP in a round")))
    if np.isfinite(of_dense := _most(has.get("max_client_flops_share", np.empty(0))[1:])):
        rows.append(("beside dense", f"at most {share(of_dense)} of the FLOPs that dense training would take the client"))
    if "max_client_memory" in has:
        rows.append(("largest client", quantity(_most(has["max_client_memory"]), "B of memory") + _by_term(has)))
    rows += _of_devices(has) + _reached(run)
    if "seconds" in has:
        seconds = has["seconds"]
        rows.append(("time", f"{duration(np.nansum(seconds))}, {duration(float(np.nanmedian(seconds)))} a round"))
    return rows + _pruning(has) + _smaller(has)


def _of_devices(has: dict[str, Array]) -> list[tuple[str, ...]]:
    """The virtual clock, what the devices used, and why answers did not count."""
    if not {"clock", "round_time", "energy"} <= has.keys():
        return []
    clock, lasted = has["clock"][-1], float(np.nanmedian(has["round_time"][1:])) if len(has["round_time"]) > 1 else 0.0
    rows: list[tuple[str, ...]] = [("devices", f"{duration(clock)}, {duration(lasted)} a round; {quantity(np.nansum(has['energy']), 'J')}")]
    missed = {name: int(np.nansum(has[name])) for name in ("late", "failed", "unfit", "unavailable") if name in has}
    if any(missed.values()):
        rows.append(("did not count", ", ".join(f"{count:,} {name}" for name, count in missed.items() if count) + " in all rounds"))
    if "staleness" in has:
        rows.append(
            ("staleness", f"{np.nanmean(has['staleness']):.2g} server steps, mean; at most {np.nanmax(has['staleness']):.2g} in a round")
        )
    return rows


def _reached(run: RunReader) -> list[tuple[str, ...]]:
    """How many clients have ever trained for the model, and how much of the training images they hold, where some have not."""
    counts = run.counts() if {"status", "samples"} <= set(run.names("clients")) else None
    if counts is None or counts.shape[0] * (run.rounds + 1) > MOST_ANSWERS or not counts.sum():
        return []
    filled = counts.sum(1) > 0
    answered = (run.clients("samples")[1:] > 0).any(0) & filled
    if answered.sum() == filled.sum():
        return []
    of_classes = counts[answered].sum(0) / np.maximum(counts.sum(0), 1)
    held = np.where(counts.sum(0) > 0, of_classes, np.inf)
    least, named = int(held.argmin()), run.called("class")
    of_all = (
        f"{answered.sum():,} of {filled.sum():,} clients, who hold {share(counts[answered].sum() / counts.sum())} of the training images"
    )
    return [("reached", f"{of_all}; of class {escape(named[least]) if named else least} the least, {share(held[least])}")]


def _server(has: dict[str, Array]) -> list[tuple[str, ...]]:
    """What the server itself computed with networks, by what it was for."""
    parts = {name.removeprefix(SERVER): np.nansum(column) for name, column in has.items() if name.startswith(SERVER)}
    shown = [f"{quantity(flops, 'FLOP')} for {escape(what.replace('_', ' '))}" for what, flops in parts.items() if flops > 0]
    return [("the server itself", ", ".join(shown))] if shown else []


def _by_term(has: dict[str, Array]) -> str:
    """The terms of the largest memory, largest first; those below a hundredth together."""
    r = int(np.nanargmax(has["max_client_memory"]))
    whole = has["max_client_memory"][r]
    parts = {name.removeprefix(MEMORY).replace("_", " "): column[r] for name, column in has.items() if name.startswith(MEMORY)}
    shown = sorted(((value, name) for name, value in parts.items() if value > 0 and value >= whole / 100), reverse=True)
    if not shown:
        return ""
    rest = whole - sum(value for value, _ in shown)
    lines = [f"{quantity(value, 'B')} {name}" for value, name in [*shown, *([(rest, "others")] if rest > 0 else [])]]
    return ": " + ", ".join(lines)


def _most(values: Array) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")


def _pruning(has: dict[str, Array]) -> list[tuple[str, ...]]:
    """What was selected in round 0, and how many weights changed places since."""
    rows: list[tuple[str, ...]] = []
    first = [f"busiest client {quantity(flops, 'FLOP')}" for flops in has.get("max_client_flops", np.empty(0))[:1] if flops > 0]
    if {"chosen_candidate", "candidates", "candidate_loss"} <= has.keys():
        number, pool, loss = (has[name][0] for name in ("chosen_candidate", "candidates", "candidate_loss"))
        rows.append(("selection", "; ".join([f"candidate {number:.0f} of {pool:.0f}, loss {loss:.3f}", *first])))
    elif first:
        rows.append(("before round 1", first[0]))
    if "weights_swapped" in has and (moved := np.nan_to_num(has["weights_swapped"])).any():
        rows.append(("adjustments", f"{np.count_nonzero(moved)} rounds, {moved.sum():,.0f} weights moved in all"))
    return rows


FORMS = {
    "client's own network": "client_accuracy",
    "averaged model": "averaged_client_accuracy",
    "dynamic gates": "gated_client_accuracy",
    "dynamic gates, personalised": "personal_client_accuracy",
    "client's own network on the global test set": "client_global_accuracy",
}


def _smaller(has: dict[str, Array]) -> list[tuple[str, ...]]:
    """What a cut left of the network, and the clients' own masks and sub-networks, as last recorded."""
    rows: list[tuple[str, ...]] = []
    if "client_density" in has:
        rows.append(("clients' masks", f"{share(_last(has['client_density']))} of the weights in a client's own model"))
    if {"inference_share", "parameters", "parameters_share"} <= has.keys():
        flops, count, part = (_last(has[name]) for name in ("inference_share", "parameters", "parameters_share"))
        rows.append(("network", f"{share(flops)} of the FLOPs, {count:,.0f} of {count / part:,.0f} parameters"))
    if "client_inference_share" in has:
        overlap = f", overlap {share(_last(has['client_overlap']))}" if "client_overlap" in has else ""
        size = "export_share" if "export_share" in has else "client_inference_share"
        rows.append(("sub-networks", f"{share(_last(has[size]))} of the FLOPs{overlap}"))
    if {"nominal_share", "active_share", "varying_share"} <= has.keys():
        nominal, active, varying = (share(_last(has[name])) for name in ("nominal_share", "active_share", "varying_share"))
        rows.append(
            ("dynamic gates", f"at most {nominal} of the FLOPs, {active} measured; {varying} of the channels differ between images")
        )
    forms = {name: _last(has[key]) for name, key in FORMS.items() if key in has}
    if len(forms) > 1:
        rows.append(("clients' accuracy", "; ".join(f"{share(value)} {name}" for name, value in forms.items())))
    return rows


def _last(values: Array) -> float:
    """The last measured one."""
    return float(values[np.isfinite(values)][-1])


def _clients(run: RunReader) -> tuple[list[tuple[str, ...]], list[str]]:
    """How the clients fare with the last model that they were evaluated on; and why this is not known, where it is damaged."""
    try:
        return _spread(run), []
    except BadInput as error:
        return [], [str(error)]


def _spread(run: RunReader) -> list[tuple[str, ...]]:
    measured = run.column("client_accuracy_macro") if "client_accuracy_macro" in run.names() else np.empty(0)
    if "accuracy" not in run.names("clients") or not np.isfinite(measured).any():
        return []
    r = int(np.flatnonzero(np.isfinite(measured))[-1])
    values = run.clients("accuracy", r)
    worst = run.column("worst_client")[r] if "worst_client" in run.names() else np.nan
    values = values[np.isfinite(values)]
    if not len(values):
        return []
    spread = f"mean {share(values.mean())}, 10th percentile {share(np.percentile(values, 10))}, lowest {share(values.min())}"
    spread += f" ({_called(run, int(worst))})" if np.isfinite(worst) else ""
    return [(f"{len(values):,} clients, round {r}", spread)]


def _called(run: RunReader, client: int) -> str:
    """A client by its number, and by its name in the user's own file; a name that is too long, as of many users together, is left out."""
    known = run.called("client") or []
    name = known[client] if client < len(known) else ""
    return f"client {client}, called {escape(repr(name))}" if 0 < len(name) <= NAME else f"client {client}"


def _timing(run: RunReader) -> list[tuple[str, ...]]:
    """The phases by their time, longest first, and their share; what runs beside the others is not added to them."""
    spent = {name: float(np.nansum(run.timing(name))) for name in run.names("timing")}
    aside = beside(run)
    total = sum(seconds for name, seconds in spent.items() if name not in aside)
    rows: list[tuple[str, ...]] = []
    for name, seconds in sorted(spent.items(), key=lambda entry: -entry[1]):
        if total > 0 and seconds > 0:
            bar = "━" * max(1, round(30 * min(seconds / total, 1)))
            rows.append(
                (
                    escape(name),
                    f"{duration(seconds):>8}",
                    f"[cyan]{bar}[/] {seconds / total:.0%}" + (" beside the rest" if name in aside else ""),
                )
            )
    return rows
