"""Whom the server asks in a round: drawn as without devices, then those that are there, the fastest, or by a rule of the job's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedsim.devices.draws import Ints
from fedsim.errors import BadInput
from fedsim.fleet.client_images import count_of, shown, steps_of
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.timed.rules import Rules
from fedsim.fleet.timed.state import ANSWERED, UNAVAILABLE, UNFIT, ClockState

POOL = 10  # candidates for each client that is wanted, among whom the fastest or a rule of the job's own chooses
SCANNED = 10_000  # clients that are looked at, at least, before the server gives up for now


def draws(fleet: LocalFleet, k: int, r: int, attempt: int) -> Iterator[Ints]:
    """Distinct clients in the order of the round's draw, in pieces: first the cohort that a run without devices has."""
    seen, size, piece = np.zeros(0, dtype=np.int64), k, 0
    while len(seen) < fleet.filled:
        seed = (fleet.site.seed, r) if not (piece or attempt) else (fleet.site.seed, r, attempt, piece)
        drawn = fleet.drawn(np.random.default_rng(seed), size)
        new = drawn[~np.isin(drawn, seen)]
        seen = np.concatenate([seen, new])
        yield new
        size, piece = min(fleet.filled, 4 * size), piece + 1


def chosen(fleet: LocalFleet, rules: Rules, k: int, r: int, attempt: int, state: ClockState) -> tuple[list[int], dict[int, list[int]]]:
    """The clients that are asked, sorted, and by status others that were named before them. Fewer where fewer are there."""
    wanted = min(rules.asked(k), fleet.filled)
    single = rules.select not in ("fastest", "own")  # taken as they are named, not chosen of several
    enough = wanted if single else min(fleet.filled, POOL * wanted)
    found, missed, scanned = list[int](), {UNAVAILABLE: list[int](), UNFIT: list[int]()}, 0
    for piece in draws(fleet, wanted, r, attempt):
        status = _status(rules, piece, r, attempt, state)
        for client, code in zip(piece.tolist(), status.tolist(), strict=True):
            if len(found) >= enough:
                break
            if code == ANSWERED:
                found.append(client)
            else:
                missed[code].append(client)
                enough -= code == UNAVAILABLE and rules.select == "uniform"
        scanned += len(piece)
        if len(found) >= enough or scanned >= max(SCANNED, POOL * wanted):
            break
    if single:
        return sorted(found), missed
    pool = np.array(found, dtype=np.int64)
    if rules.own_select is not None:
        return np.sort(_by_own_rule(rules, pool, min(wanted, len(pool)), r)).tolist(), {}
    return np.sort(pool[np.argsort(_seconds(fleet, rules, pool), kind="stable")][:wanted]).tolist(), {}


def _status(rules: Rules, clients: Ints, r: int, attempt: int, state: ClockState) -> np.ndarray:
    """(K,) whether each is away, cannot have the memory for what clients did in the last round, or may be asked."""
    there = rules.mix.available(rules.seed, clients, r + (attempt << 32), state.seconds)
    small = rules.mix.of(rules.seed, clients).memory < state.need if state.need and rules.unfit == "skip" else np.zeros(len(clients), bool)
    return np.where(~there, UNAVAILABLE, np.where(small, UNFIT, ANSWERED))


def _seconds(fleet: LocalFleet, rules: Rules, clients: Ints) -> np.ndarray:
    """(K,) what dense local training of the round would take each client."""
    devices, feed = rules.mix.of(rules.seed, clients), rules.local
    counts = [count_of(fleet.site.population, feed, int(client)) for client in clients]
    images, steps = (np.array([of(feed, count) for count in counts], float) for of in (shown, steps_of))
    sent = 2 * devices.latency + 8 * rules.size * (1 / devices.down + 1 / devices.up)
    return sent + rules.flops * images / devices.flops + steps * devices.overhead


def _by_own_rule(rules: Rules, pool: Ints, wanted: int, r: int) -> Ints:
    """What the job's own function chooses; BadInput where these are not `wanted` distinct clients of those it was given."""
    assert rules.own_select is not None
    found = np.asarray(rules.own_select(pool.copy(), wanted, r, rules.mix.of(rules.seed, pool)))
    if found.shape != (wanted,) or len(np.unique(found)) != wanted or not np.isin(found, pool).all():
        shown = found.tolist() if found.size <= 8 else f"{found.size} values"
        raise BadInput(f"[cohort] select: it returned {shown}; it must return {wanted} distinct clients of the {len(pool)} it was given")
    return found.astype(np.int64)
