"""Damage that HDF5 itself does not see: moved and hidden values of clients, other names and units, masks and gates of another round."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedsim_analysis
import h5py
import numpy as np
import pytest
import torch
from fedsim_analysis import checksums

from fedsim.errors import BadInput
from fedsim.storage.client_gates import Gates
from fedsim.storage.columns import COLUMNS, Column
from fedsim.storage.reader import RunReader
from fedsim.storage.writer import RunWriter

CLIENTS = 600  # two chunks
IDS = np.array([3, 100, 599])
ATTRIBUTES = {"job": 'name = "a"\n', "method": "fedavg", "seed": 3}
FEW = {name: COLUMNS[name] for name in ("rounds/loss", "clients/loss", "layers/density")}
NAMES = {"client": [f"c{i}" for i in range(CLIENTS)], "class": ["cat", "dog"]}


def gates(seed: int) -> Gates:
    return Gates(np.array([1, 3]), np.random.default_rng(seed).random((2, 13)) < 0.5, {"conv0": 9, "conv1": 4})


def write(record: RunWriter, r: int) -> None:
    masks = {"mask/a": torch.arange(40) % (1 + r // 2) == 0}
    record.row(r, {"loss": r}, {"loss": (IDS[::-1], IDS[::-1] + r)}, masks=masks, gates=gates(r // 3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Five rounds; masks change at 2 and 4, gates at 3 and at the end."""
    made = tmp_path / "run.h5"
    counts = np.arange(2 * CLIENTS).reshape(CLIENTS, 2)
    with RunWriter.create(
        made, attributes=ATTRIBUTES, layers=["conv1"], clients=CLIENTS, columns=FEW, counts=counts, called=NAMES, kinds=counts[:, 0] % 3
    ) as record:
        for r in range(5):
            write(record, r)
        record.finish({"w/a": torch.ones(3)}, "0" * 64, gates(9))
    return made


def move(file: h5py.File, here: tuple[int, int], there: tuple[int, int]) -> None:
    """The chunk of one place to another, packed as it is: what a flipped bit in the index of the chunks can do."""
    column = file["clients/loss"].id
    column.write_direct_chunk(there, column.read_direct_chunk(here)[1])


def hide(file: h5py.File) -> None:
    file["clients/loss"][2, 512:] = np.nan


def shift(file: h5py.File) -> None:
    """The value of client 3 is client 4's."""
    file["clients/loss"][2, 3:5] = file["clients/loss"][2, 3:5][::-1]


def entry(path: str, index: int, value: Any) -> Callable[[h5py.File], None]:
    return lambda file: file[path].__setitem__(index, value)


def attribute(path: str, name: str, value: Any) -> Callable[[h5py.File], None]:
    return lambda file: file[path].attrs.__setitem__(name, value)


Read = Callable[[RunReader], Any]
DAMAGES: dict[str, tuple[Callable[[h5py.File], Any], Read, str]] = {  # the damage, what it meets, what the message says
    "another round's values": (lambda file: move(file, (1, 0), (2, 0)), lambda run: run.clients("loss"), "clients/loss .* in round 2"),
    "in one round": (lambda file: move(file, (1, 0), (2, 0)), lambda run: run.clients("loss", 2), "clients/loss .* in round 2"),
    "of one client": (lambda file: move(file, (1, 0), (2, 0)), lambda run: run.client("loss", 3), "clients/loss .* in round 2"),
    "another client's values": (lambda file: move(file, (1, 512), (2, 0)), lambda run: run.clients("loss"), "clients/loss .* in round 2"),
    "a value that another client has": (shift, lambda run: run.clients("loss"), "clients/loss .* in round 2"),
    "hidden values": (hide, lambda run: run.clients("loss"), "clients/loss .* in round 2"),
    "hidden from one client": (hide, lambda run: run.client("loss", 599), "clients/loss .* in round 2"),
    "a hidden column": (lambda file: file.move("clients/loss", "clients/lost"), lambda run: run.names("clients"), "loss is missing"),
    "a hidden scale": (lambda file: file.move("layers/layer", "layers/laye"), lambda run: run.names("layers"), "layers/layer is missing"),
    "units": (attribute("rounds/loss", "units", "nau"), lambda run: run.about("rounds", "loss"), "the unit .* of rounds/loss"),
    "a description": (attribute("clients/loss", "long_name", "x"), lambda run: run.about("clients", "loss"), "description of clients/loss"),
    "no description": (
        lambda file: file["layers/density"].attrs.clear(), lambda run: run.about("layers", "density"), "description of layers/density"
    ),
    "a client's name": (entry("partition/client_name", 7, "c8"), lambda run: run.called("client"), "partition/client_name is damaged"),
    "a class's name": (entry("partition/class_name", 1, "eog"), lambda run: run.called("class"), "partition/class_name is damaged"),
    "no names": (lambda file: file.pop("partition/client_name"), lambda run: run.called("client"), "partition/client_name is missing"),
    "a client's number": (entry("client", 7, 6), lambda run: run.labels("client"), "client is damaged"),
    "counts": (entry("partition/counts", 7, 6), lambda run: run.counts(), "partition/counts is damaged"),
    "no counts": (lambda file: file.pop("partition/counts"), lambda run: run.counts(), "partition/counts is missing"),
    "kinds of devices": (entry("devices/kind", 7, 5), lambda run: run.kinds(), "devices/kind is damaged"),
    "no kinds of devices": (lambda file: file.pop("devices/kind"), lambda run: run.kinds(), "devices/kind is missing"),
    "the round of a mask": (lambda file: file.move("masks/2", "masks/3"), lambda run: run.masks(2), "masks is damaged in round 2"),
    "no mask": (lambda file: file.pop("masks/4"), lambda run: run.masks(9), "masks is damaged in round 4"),
    "no gates": (lambda file: file.pop("client_gates/3"), lambda run: run.gates(3), "client_gates is damaged in round 3"),
    "no gates at the end": (lambda file: file.pop("client_gates/final"), lambda run: run.gates(), "client_gates/final is missing"),
    "the layer of gates": (
        attribute("client_gates/final", "groups", '[["conv0", 9], ["conv3", 4]]'), lambda run: run.groups(), "client_gates/final is damaged"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_that_hdf5_does_not_see(kind: str, path: Path) -> None:
    damage, read, message = DAMAGES[kind]
    read(RunReader(path))
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(BadInput, match=message):
        read(RunReader(path))


def test_every_bit_of_the_index_of_chunks(path: Path) -> None:
    """One flipped bit of each byte that is used: the values are right or refused."""
    raw, right = path.read_bytes(), RunReader(path).clients("loss")
    nodes = [match.start() for match in re.finditer(rb"TREE\x01", raw)]
    used = [at for node in nodes for at in range(node, node + 600) if raw[at]]
    refused = 0
    for step, at in enumerate(used[::3]):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << step % 8]) + raw[at + 1 :])
        try:
            np.testing.assert_array_equal(RunReader(path).clients("loss"), right)
        except BadInput:
            refused += 1
    assert refused > 10


def as_formerly(path: Path) -> None:
    """As a writer left it that gave rounds alone their checksums."""
    with h5py.File(path, "r+") as file:
        del file["checksums"]
        for name in FEW:
            if not name.startswith("clients/"):
                checksums.lay_out(file, [name])
        del file["checksums/about"]
        file.attrs["crc32"] = "{}"


def test_files_of_former_writers_are_read_and_protected_once_they_go_on(path: Path) -> None:
    right = RunReader(path).clients("loss")
    as_formerly(path)
    assert RunReader(path).about("rounds", "loss") == Column("nat", COLUMNS["rounds/loss"].about)
    np.testing.assert_array_equal(RunReader(path).client("loss", 100), right[:, 100])
    with RunWriter.resume(path, 3) as record:
        for r in (4, 5):
            write(record, r)
    np.testing.assert_array_equal(RunReader(path).clients("loss")[:5], right)
    assert fedsim_analysis.load(path).units("clients") == {"loss": "nat"}
    with h5py.File(path, "r+") as file:
        move(file, (1, 0), (2, 0))
        file["rounds/loss"].attrs["units"] = "nau"
    for read in (lambda run: run.clients("loss"), lambda run: run.client("loss", 3), lambda run: run.about("rounds", "loss")):
        with pytest.raises(BadInput, match="damaged"):
            read(RunReader(path))


def test_a_client_that_is_given_twice_has_its_last_value(path: Path) -> None:
    with RunWriter.resume(path, 4) as record:
        record.row(5, {}, {"loss": (np.array([9, 2, 9, 599]), np.array([1.0, 2.0, 3.0, np.nan]))})
    assert RunReader(path).clients("loss", 5)[[2, 9]].tolist() == [2, 3]
    assert np.isnan(RunReader(path).client("loss", 599)[5])
