"""Whom the server asks in a round: drawn as without devices, then those that are there, the fastest, or by a rule of the job's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedsim.devices.draws import Ints
from fedsim.errors import BadInput
from fedsim.fleet.local_fleet import LocalFleet
from fedsim.fleet.timed.rules import Rules

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


def chosen(fleet: LocalFleet, rules: Rules, k: int, r: int, attempt: int, seconds: float) -> tuple[list[int], list[int]]:
    """The clients that are asked, sorted, and those that were wanted and are not there. Fewer are asked where fewer are there."""
    wanted = min(rules.asked(k), fleet.filled)
    if rules.select == "uniform":
        named = np.sort(next(draws(fleet, wanted, r, attempt)))
        there = _there(rules, named, r, attempt, seconds)
        return named[there].tolist(), named[~there].tolist()
    pool, away = _pool(fleet, rules, wanted, r, attempt, seconds)
    if rules.select == "fastest":
        pool = pool[np.argsort(_seconds(fleet, rules, pool), kind="stable")]
    elif rules.own_select is not None:
        pool = _by_own_rule(rules, pool, min(wanted, len(pool)), r)
    return np.sort(pool[:wanted]).tolist(), away


def _pool(fleet: LocalFleet, rules: Rules, wanted: int, r: int, attempt: int, seconds: float) -> tuple[Ints, list[int]]:
    """Those that are there, in the order of the draw: as many as are wanted, or more where they are chosen from."""
    enough = wanted if rules.select in ("available", "fits") else min(fleet.filled, POOL * wanted)
    found, away, scanned = [], list[int](), 0
    for piece in draws(fleet, wanted, r, attempt):
        there = _there(rules, piece, r, attempt, seconds)
        found.append(piece[there])
        away += piece[~there].tolist()
        scanned += len(piece)
        if sum(map(len, found)) >= enough or scanned >= max(SCANNED, POOL * wanted):
            break
    pool = np.concatenate(found)[:enough]
    return pool, away


def _there(rules: Rules, clients: Ints, r: int, attempt: int, seconds: float) -> np.ndarray:
    return rules.mix.available(rules.seed, clients, r + (attempt << 32), seconds)


def _seconds(fleet: LocalFleet, rules: Rules, clients: Ints) -> np.ndarray:
    """(K,) what dense local training of the round would take each client."""
    devices = rules.mix.of(rules.seed, clients)
    images = np.array([fleet.site.population.size(int(client)) for client in clients], float)
    return 2 * devices.latency + 8 * rules.size * (1 / devices.down + 1 / devices.up) + rules.flops * images / devices.flops


def _by_own_rule(rules: Rules, pool: Ints, wanted: int, r: int) -> Ints:
    """What the job's own function chooses; BadInput where these are not `wanted` distinct clients of those it was given."""
    assert rules.own_select is not None
    found = np.asarray(rules.own_select(pool.copy(), wanted, r, rules.mix.of(rules.seed, pool)))
    if found.shape != (wanted,) or len(np.unique(found)) != wanted or not np.isin(found, pool).all():
        shown = found.tolist() if found.size <= 8 else f"{found.size} values"
        raise BadInput(f"[cohort] select: it returned {shown}; it must return {wanted} distinct clients of the {len(pool)} it was given")
    return found.astype(np.int64)
