"""What a method promises of density and zeros, and what the ledger charges for what is sent."""

from __future__ import annotations

import numpy as np
import pytest
from cases import FLEETS, TABLE

from fedsim.storage.reader import RunReader, read_model

NAMES = list(TABLE)


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("name", NAMES)
def test_density_never_exceeds_the_budget(name, fleet, alone) -> None:
    if TABLE[name].budget is not None:
        assert RunReader(alone[name, fleet]).column("density").max() <= TABLE[name].budget


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("name", NAMES)
def test_pruned_weights_are_exactly_zero(name, fleet, alone) -> None:
    model = read_model(alone[name, fleet])
    masks = [key for key in model if key.startswith("mask/")]
    assert bool(masks) == TABLE[name].masked
    for key in masks:
        assert (model["w/" + key[5:]][~model[key]] == 0).all()
        assert (model["w/" + key[5:]][model[key]] != 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_ledger_charges_what_would_be_encoded(name, alone) -> None:
    """Every size that the ledger charges is that of the real encoding, which decodes to what was sent."""
    encoded = alone.encoded(name)
    assert not encoded.errors
    assert encoded.size > 0


def test_a_static_masks_bytes_by_hand(alone) -> None:
    """Dense first layer and free values 4 bytes each, kept weights 4, positions once to each client and again when they changed."""
    reader = RunReader(alone["static-mask", "serial"])
    model = read_model(alone["static-mask", "serial"])
    kept = sum(int(model[key].sum()) for key in model if key.startswith("mask/"))
    sizes = [model[key].numel() for key in model if key.startswith("mask/")]
    ones = [int(model[key].sum()) for key in model if key.startswith("mask/")]
    others = sum(value.numel() for key, value in model.items() if key[:2] in ("w/", "bu") and "mask/" + key[2:] not in model)
    positions = sum(min(4 * one, -(-size // 8)) for one, size in zip(ones, sizes, strict=True))
    up = reader.clients("bytes_up", 1)
    down = reader.clients("bytes_down", 1)
    took = reader.clients("in_cohort", 1) == 1
    assert took.sum() == 4
    assert (up[took] == 4 * (kept + others)).all()
    assert (down[took] == 4 * (kept + others) + positions).all()
    later = np.nansum(reader.clients("in_cohort"), axis=0)
    third = reader.clients("bytes_down", 3)
    assert (third[reader.clients("in_cohort", 3) == 1] > 4 * (kept + others)).all()
    assert later.max() == 3
