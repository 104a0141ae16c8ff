"""The virtual clock by hand: seconds and joules of clients of known speed, bytes and density."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.devices.clock import Need, times
from fedsim.devices.kind import DeviceKind
from fedsim.devices.mix import DeviceMix
from fedsim.devices.sparse_time import MEASURED, SparseTime
from fedsim.errors import BadInput

SLOW = DeviceKind(
    "slow", 0.5, flops=2e6, memory=1e6, down=8e3, up=4e3, overhead=0.25, latency=0.5, power=3.0, power_radio=2.0, power_idle=0.5
)
FAST = DeviceKind("fast", 0.5, flops=1e9, memory=1e9, down=8e6, up=8e6, power=10.0)
TWO = DeviceMix("two", (SLOW, FAST), rows=np.array([0, 1]))
NEED = Need({1.0: 4_000_000}, steps=8, bytes_down=1000, bytes_up=500, memory=0)


def test_two_clients_of_known_speed_and_bytes() -> None:
    devices = TWO.of(0, [0, 1])
    found = times(TWO, devices, [NEED, NEED])
    assert found.down.tolist() == [0.5 + 8 * 1000 / 8e3, 8 * 1000 / 8e6]
    assert found.compute.tolist() == [4e6 / 2e6 + 8 * 0.25, 4e6 / 1e9]
    assert found.up.tolist() == [0.5 + 8 * 500 / 4e3, 8 * 500 / 8e6]
    assert found.total.tolist() == [1.5 + 4.0 + 1.5, 0.001 + 0.004 + 0.0005]
    waiting = found.total.max() - found.total
    assert found.joules(devices, waiting).tolist() == [3.0 * 4 + 2.0 * 3, 10.0 * 0.004]
    assert found.joules(devices, np.array([2.0, 0.0]))[0] == 12 + 6 + 0.5 * 2


def test_a_request_without_bytes_still_takes_the_latency_each_way() -> None:
    found = times(TWO, TWO.of(0, [0, 1]), [Need({}, 0, 0, 0, 0)] * 2)
    assert found.total.tolist() == [2 * 0.5, 0.0]


@pytest.mark.parametrize(("sparse", "share"), [("none", 1.0), ("ideal", 0.1), ("measured", 0.308), ({"0.01": 0.2, "1": 1.0}, 0.6)])
def test_time_of_a_layer_of_density_a_tenth(sparse, share) -> None:
    kind = DeviceKind("one", 1.0, flops=1e6, memory=1.0, down=1.0, up=1.0, sparse=sparse)
    mix = DeviceMix("one", (kind,))
    need = Need({0.1: 3_000_000, 1.0: 1_000_000}, 0, 0, 0, 0)
    assert times(mix, mix.of(0, [0]), [need]).compute.tolist() == pytest.approx([3 * share + 1], rel=1e-12)


def test_clients_of_two_kinds_with_one_need_have_each_the_curve_of_its_own() -> None:
    kinds = (
        DeviceKind("plain", 0.5, flops=1.0, memory=1.0, down=1.0, up=1.0),
        DeviceKind("ideal", 0.5, flops=1.0, memory=1.0, down=1.0, up=1.0, sparse="ideal"),
    )
    mix = DeviceMix("both", kinds, rows=np.array([0, 1, 0]))
    shared = Need({0.5: 8}, 0, 0, 0, 0)
    assert times(mix, mix.of(0, [0, 1, 2]), [shared] * 3).compute.tolist() == [8.0, 4.0, 8.0]


def test_what_has_passed_at_a_moment() -> None:
    found = times(TWO, TWO.of(0, [0, 0, 0, 0]), [NEED] * 4).until(np.array([1.0, 3.5, 6.0, 99.0]))
    assert found.down.tolist() == [1.0, 1.5, 1.5, 1.5]
    assert found.compute.tolist() == [0.0, 2.0, 4.0, 4.0]
    assert found.up.tolist() == [0.0, 0.0, 0.5, 1.5]


def test_the_curve_passes_through_its_points_and_between_them_is_linear_in_the_logarithm() -> None:
    curve = SparseTime.of("measured")
    densities = np.array(list(MEASURED))
    assert curve.share(densities).tolist() == pytest.approx(list(MEASURED.values()), rel=1e-12)
    middle = np.sqrt(0.05 * 0.1)
    assert curve.share(np.array([middle]))[0] == pytest.approx((0.2 + 0.308) / 2, rel=1e-12)
    assert curve.share(np.array([0.0, 0.001])).tolist() == [0.109, 0.109]


def test_sparse_training_never_takes_longer_at_a_lower_density() -> None:
    shares = SparseTime.of("measured").share(np.geomspace(0.005, 1, 200))
    assert (np.diff(shares) >= 0).all()


def test_a_table_with_two_spellings_of_one_density_keeps_no_hidden_point() -> None:
    with pytest.raises(BadInput, match=r"density 0\.1 twice"):
        SparseTime.of({"0.1": 0.5, "0.10": 0.6})
