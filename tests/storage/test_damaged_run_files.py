"""Damaged and hostile run files: every command and both readers give the right values, or one message that says what is wrong."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fedsim_analysis
import h5py
import numpy as np
import pytest
import torch
from cases import images, run
from fedsim_analysis import run_file
from fedsim_analysis.export import command
from rich.console import Console

from fedsim.cli import results
from fedsim.errors import BadInput
from fedsim.reporting.summary import show
from fedsim.simulation.export import export
from fedsim.storage.doctor.command import doctor
from fedsim.storage.reader import RunReader

MEMORY = 400  # MB that reading such a file may take
Damage = Callable[[Path], None]
BASES = {"masks": "fedtiny", "gates": "dwfnp"}
ALL = ("reader", "show", "compare", "export", "analysis")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """masks.h5 with masks that changed, gates.h5 with gates of clients: two real runs."""
    folder = tmp_path_factory.mktemp("bases")
    images(folder)
    for name, line in BASES.items():
        assert run(line, "serial", folder, folder / f"{name}.h5") == 0
    return folder


# ---- the damages, each a function of the path


def inside(act: Callable[[h5py.File], Any]) -> Damage:
    def damage(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            act(file)

    return damage


def attribute(name: str, value: Any, at: str = "/") -> Damage:
    """Another value of an attribute, of whatever type it is, in a file without checksums of attributes."""

    def act(file: h5py.File) -> None:
        file.attrs.pop("crc32", None)
        del file[at].attrs[name]
        file[at].attrs[name] = value

    return inside(act)


def lacks(name: str, at: str = "/") -> Damage:
    return inside(lambda file: (file.attrs.pop("crc32", None), file[at].attrs.__delitem__(name)))


def flipped_attribute(name: str) -> Damage:
    """One bit of an attribute, which leaves it a value that could be."""

    def act(file: h5py.File) -> None:
        value = file.attrs[name]
        file.attrs[name] = value ^ 1 if isinstance(value, np.integer) else value[:-3] + chr(ord(value[-3]) ^ 1) + value[-2:]

    return inside(act)


def without(path: str) -> Damage:
    return inside(lambda file: file.__delitem__(path))


def instead(path: str, make: Callable[[h5py.File, str], Any]) -> Damage:
    """Something else at a path, with the attributes of what stood there."""

    def act(file: h5py.File) -> None:
        kept = dict(file[path].attrs)
        del file[path]
        made = make(file, path)
        if made is not None:
            made.attrs.update({name: value for name, value in kept.items() if name in ("units", "long_name", "dtype", "shape", "masked")})

    return inside(act)


def array(value: Any, **options: Any) -> Callable[[h5py.File, str], Any]:
    return lambda file, path: file.create_dataset(path, data=value, **options)


def vast(shape: tuple[int, ...], dtype: Any = float, **options: Any) -> Callable[[h5py.File, str], Any]:
    """A dataset that claims a shape, of which nothing is stored."""
    return lambda file, path: file.create_dataset(path, shape, dtype, **options)


def link(to: Any) -> Callable[[h5py.File, str], None]:
    return lambda file, path: file.__setitem__(path, to)


def outside(file: h5py.File, path: str) -> Any:
    """A dataset whose bytes lie in another file."""
    return file.create_dataset(path, (10,), float, external=[("/etc/passwd", 0, 80)])


def virtual(file: h5py.File, path: str) -> Any:
    layout = h5py.VirtualLayout((10,), float)
    layout[:] = h5py.VirtualSource("masks.h5", "rounds/loss", (10,))
    return file.create_virtual_dataset(path, layout)


def foreign_filter(file: h5py.File, path: str) -> Any:
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((10,))
    plan.set_filter(32111, h5py.h5z.FLAG_OPTIONAL, ())
    space = h5py.h5s.create_simple((10,))
    return h5py.Dataset(h5py.h5d.create(file.id, path.encode(), h5py.h5t.IEEE_F64LE, space, plan))


def undecodable(file: h5py.File) -> None:
    column = file["clients/accuracy"]
    column.id.write_direct_chunk((1, 0), b"not zlib at all")


def edited(path: str, act: Callable[[np.ndarray], Any]) -> Damage:
    """Some values changed where they lie, as a flipped bit would."""

    def damage(file: h5py.File) -> None:
        values = file[path][()]
        act(values)
        file[path][...] = values

    return inside(damage)


def flip(values: np.ndarray) -> None:
    values.view(np.uint8).reshape(len(values), -1)[1, 0] ^= 1


def flip_packed(file: h5py.File) -> None:
    """One bit of a chunk as it lies on the disk."""
    column = file["clients/accuracy"].id
    mask, raw = column.read_direct_chunk((2, 0))
    column.write_direct_chunk((2, 0), raw[:9] + bytes([raw[9] ^ 4]) + raw[10:], mask)


def columns_in_a_circle(file: h5py.File) -> None:
    file["model/again"] = file["model"]
    file["rounds/rounds"] = file["rounds"]


def nested(opening: str, closing: str, depth: int) -> str:
    return opening * depth + closing * depth


def many_links(file: h5py.File) -> None:
    """A tree of groups in which each stands twice in the one before: 2^20 paths."""
    at = file["model"].create_group("w2")
    for _ in range(20):
        below = at.create_group("a")
        at["b"] = below
        at = below


def cut(share: float) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flipped_file(position: float) -> Damage:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(len(content) * position)] ^= 0x10
        path.write_bytes(content)

    return damage


def other_program(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["temperature"] = np.arange(5)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def layout_of_masks(tensors: Any) -> Damage:
    return attribute("tensors", tensors if isinstance(tensors, str) else json.dumps(tensors), "masks/0")


NONE: tuple[str, ...] = ()
MODEL, WEIGHT = ("reader", "export"), "model/w/conv1.weight"
SHOWN = ("reader", "show")
JOB, PLAN = ("reader", "compare", "export"), ("reader", "show", "export")
# name -> (which run, the damage, who must refuse it; whoever does not gives the right values)
KINDS: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    # the file
    "zero bytes": ("masks", cut(0), ALL),
    "eight bytes": ("masks", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), ALL),
    "half": ("masks", cut(0.5), ALL),
    "all but the end": ("masks", cut(0.99), ALL),
    "text": ("masks", lambda path: path.write_text("thesis"), ALL),
    "zeros": ("masks", lambda path: path.write_bytes(bytes(path.stat().st_size)), ALL),
    "of another program": ("masks", other_program, ALL),
    "a folder": ("masks", folder, ALL),
    "a pipe": ("masks", pipe, ALL),
    "a device": ("masks", lambda path: (path.unlink(), path.symlink_to("/dev/zero"))[1], ALL),
    "a link in a circle": ("masks", lambda path: (path.unlink(), path.symlink_to(path))[1], ALL),
    "missing": ("masks", Path.unlink, ALL),
    "its superblock flipped": ("masks", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n\xff" + path.read_bytes()[9:]), ALL),
    # attributes
    "format_version is text": ("masks", attribute("format_version", "two"), ALL),
    "format_version is newer": ("masks", attribute("format_version", 99), ALL),
    "format_version is 0": ("masks", attribute("format_version", 0), ALL),
    "format_version is missing": ("masks", lacks("format_version"), ALL),
    "format_version is an array": ("masks", attribute("format_version", [2, 2]), ALL),
    "rounds is text": ("masks", attribute("rounds", "3"), ALL),
    "rounds is a fraction": ("masks", attribute("rounds", 1.5), ALL),
    "rounds is negative": ("masks", attribute("rounds", -5), ALL),
    "rounds is 10^18": ("masks", attribute("rounds", 10**18), ALL),
    "rounds is one too many": ("masks", inside(lambda file: file.attrs.modify("rounds", file.attrs["rounds"] + 1)), ALL),
    "rounds is missing": ("masks", lacks("rounds"), ALL),
    "finished is text": ("masks", attribute("finished", "yes"), ALL),
    "finished is empty": ("masks", attribute("finished", h5py.Empty("f")), ALL),
    "seed is text": ("masks", attribute("seed", "one"), ALL),
    "seed is missing": ("masks", lacks("seed"), ("compare",)),
    "method is a number": ("masks", attribute("method", 7), ALL),
    "method is missing": ("masks", lacks("method"), NONE),
    "method is an escape sequence": ("masks", attribute("method", "\x1b[2Jfedtiny"), ALL),
    "method is markup": ("masks", attribute("method", "[/red] [bold"), NONE),
    "hosts is no UTF-8": ("masks", attribute("hosts", np.bytes_(b"\xff\xfe")), ALL),
    "ranks is text": ("masks", attribute("ranks", "many"), ALL),
    "peak_flops is text": ("masks", attribute("peak_flops", "fast"), ALL),
    "a reference": ("masks", inside(lambda file: file.attrs.__setitem__("hosts", file.ref)), ALL),
    "a compound attribute": ("masks", attribute("seed", np.array((1, 2.0), [("a", int), ("b", float)])), ALL),
    "many attributes": ("masks", inside(lambda file: [file.attrs.__setitem__(f"x{i}", i) for i in range(2000)]), ALL),
    "a flipped bit in the seed": ("masks", flipped_attribute("seed"), ALL),
    "a flipped bit in the job": ("masks", flipped_attribute("job"), ALL),
    "a flipped bit in the plan": ("masks", flipped_attribute("plan"), ALL),
    "a flipped bit in the name of the method": ("masks", flipped_attribute("method"), ALL),
    "an attribute is gone": ("masks", inside(lambda file: file.attrs.__delitem__("torch_version")), ALL),
    "checksums of attributes are broken": ("masks", inside(lambda file: file.attrs.__setitem__("crc32", "{")), ALL),
    # texts
    "job is missing": ("masks", lacks("job"), JOB),
    "job is bytes of no text": ("masks", attribute("job", np.bytes_(b"\xff\x00\xfe")), ALL),
    "job is not TOML": ("masks", attribute("job", "[method\nname"), JOB),
    "job is of 60 MB": ("masks", attribute("job", "a = 1\n" * 10**7), ALL),
    "job is of 1 MB": ("masks", attribute("job", "".join(f"a{i} = [[1]]\n" for i in range(60_000))), ALL),
    "job is nested deeply": ("masks", attribute("job", "a = " + nested("[", "]", 50_000)), JOB),
    "job is nested in keys": ("masks", attribute("job", "a" + ".a" * 20_000 + " = 1\n"), JOB),
    "job is nested in tables": ("masks", attribute("job", "[" + ".".join("a" * 100) + "]\nb = 1\n"), JOB),
    "job's method is a number": ("masks", attribute("job", "method = 3\n"), JOB),
    "job is another": ("masks", attribute("job", 'seed = 0\n[method]\nname = "fedavg"\n'), ("export",)),
    "job has an escape sequence": ("masks", attribute("job", 'name = "\\u001b[2J"\n'), JOB),
    "plan is broken": ("masks", attribute("plan", '{"fleet": '), PLAN),
    "plan is a list": ("masks", attribute("plan", "[1, 2]"), PLAN),
    "plan's packs are text": ("masks", attribute("plan", '{"packs": "many"}'), SHOWN),
    "plan is nested deeply": ("masks", attribute("plan", nested("[", "]", 30_000)), PLAN),
    "partition is broken": ("masks", attribute("partition", "{"), PLAN),
    # groups and links
    "rounds are missing": ("masks", without("rounds"), ALL),
    "timing is missing": ("masks", without("timing"), (*SHOWN, "analysis")),
    "round is missing": ("masks", without("round"), ALL),
    "client is missing": ("masks", without("client"), (*SHOWN, "analysis")),
    "masks are missing": ("masks", without("masks"), ("reader",)),
    "rounds is a column": ("masks", instead("rounds", array(np.arange(3.0))), ALL),
    "a column is a group": ("masks", instead("rounds/accuracy", lambda file, path: file.create_group(path)), ALL),
    "a column is a type": ("masks", instead("rounds/accuracy", link(np.dtype("f8"))), ALL),
    "a column is a soft link": ("masks", instead("rounds/accuracy", link(h5py.SoftLink("/rounds/loss"))), ALL),
    "a column links to another file": ("masks", instead("rounds/accuracy", link(h5py.ExternalLink("gates.h5", "/rounds/loss"))), ALL),
    "a column links to nothing": ("masks", instead("rounds/accuracy", link(h5py.SoftLink("/nowhere"))), ALL),
    "a column lies in another file": ("masks", instead("rounds/accuracy", outside), ALL),
    "a column is virtual": ("masks", instead("rounds/accuracy", virtual), ALL),
    "groups in a circle": ("masks", inside(columns_in_a_circle), ("reader", "show", "export", "analysis")),
    "groups that stand in many places": ("masks", inside(many_links), MODEL),
    "a column of an unprintable name": ("masks", inside(lambda file: file["rounds"].__setitem__("\x1b[2J", np.zeros(9))), ALL),
    # columns
    "a flipped bit in the name of a column": ("masks", inside(lambda file: file.move("rounds/accuracy", "rounds/accuracx")), ALL),
    "the name of a time is another": ("masks", inside(lambda file: file.move("timing/compute", "timing/bompute")), (*SHOWN, "analysis")),
    "a column of text": ("masks", instead("rounds/accuracy", array(["a"] * 9)), ALL),
    "a column of bytes": ("masks", instead("rounds/accuracy", array(np.full(9, b"ab"))), ALL),
    "a column of records": ("masks", instead("rounds/accuracy", array(np.zeros(9, [("a", int), ("b", float)]))), ALL),
    "a column of references": ("masks", instead("rounds/accuracy", vast((9,), h5py.ref_dtype)), ALL),
    "a column of lists": ("masks", instead("rounds/accuracy", vast((9,), h5py.vlen_dtype(float))), ALL),
    "a column of complex numbers": ("masks", instead("rounds/accuracy", array(np.zeros(9, complex))), ALL),
    "a column of no shape": ("masks", instead("rounds/accuracy", array(h5py.Empty("f8"))), ALL),
    "a column of one number": ("masks", instead("rounds/accuracy", array(3.0)), ALL),
    "a column of two dimensions": ("masks", instead("rounds/accuracy", array(np.zeros((9, 2)))), ALL),
    "a column of too few rows": ("masks", instead("rounds/accuracy", array(np.zeros(1))), ALL),
    "a column of 10^15 rows": ("masks", instead("rounds/accuracy", vast((10**15,), chunks=(1024,))), ALL),
    "a column of large chunks": ("masks", instead("rounds/accuracy", vast((9,), maxshape=(None,), chunks=(10**8,))), ALL),
    "a column of a filter that nobody has": ("masks", instead("rounds/accuracy", foreign_filter), ALL),
    "a flipped bit in an accuracy": ("masks", edited("rounds/accuracy", flip), ALL),
    "a flipped bit in a time": ("masks", edited("timing/compute", flip), (*SHOWN, "analysis")),
    "a flipped bit in a layer's density": ("masks", edited("layers/density", flip), ("reader", "analysis")),
    "a flipped bit in a checksum": ("masks", edited("checksums/rows", flip), ALL),
    "a flipped bit in a number of a round": ("masks", edited("round", flip), ALL),
    "checksums of other rows": ("masks", instead("checksums/rows", array(np.zeros((1, 1), np.uint32))), ALL),
    "a number that was not measured": ("masks", edited("rounds/accuracy", lambda values: values.__setitem__(1, 0.5)), ALL),
    "clients that cannot be unpacked": ("masks", inside(undecodable), ("reader", "analysis")),
    "a flipped bit in a client's accuracy": ("masks", inside(flip_packed), ("reader", "analysis")),
    "clients of another number": ("masks", instead("clients/accuracy", array(np.zeros((9, 3)))), (*SHOWN, "analysis")),
    "10^12 clients": ("masks", instead("client", vast((10**12,), int, chunks=(65536,), compression=1)), (*SHOWN, "analysis")),
    "10^9 rounds": ("masks", instead("round", vast((10**9,), int, chunks=(1024,))), ALL),
    "names of layers are numbers": ("masks", instead("layer", array(np.array([[1]]))), ("reader", "analysis")),
    "a flipped bit in the name of a layer": ("masks", inside(lambda file: file["layer"].__setitem__(0, "conw1")), ("reader", "analysis")),
    "counts of another shape": ("masks", instead("partition/counts", array(np.zeros(4, int))), ("reader",)),
    "10^14 counts": ("masks", instead("partition/counts", vast((5, 10**13), np.int32, chunks=(5, 1024))), ("reader",)),
    # masks
    "masks of shapes that are none": ("masks", layout_of_masks({"mask/conv2.weight": [-1, "a"]}), ("reader",)),
    "masks that claim 10^15 entries": ("masks", layout_of_masks({"mask/conv2.weight": [10**15]}), ("reader",)),
    "masks in no JSON": ("masks", layout_of_masks("{"), ("reader",)),
    "masks are numbers": ("masks", instead("masks/0", array(np.zeros(9))), ("reader",)),
    "a flipped bit in a mask": ("masks", edited("masks/0", flip), ("reader",)),
    "a mask of no round": ("masks", inside(lambda file: file["masks"].__setitem__("first", [1])), NONE),
    # gates
    "gates of a wrong length": ("gates", attribute("n", 3, "client_gates/final"), MODEL),
    "gates of too few clients": ("gates", instead("client_gates/final/clients", array(np.arange(2))), MODEL),
    "gates of clients that are not": ("gates", edited("client_gates/final/clients", lambda values: values.__setitem__(0, 99)), MODEL),
    "a flipped bit in a gate": ("gates", edited("client_gates/final/gates", flip), MODEL),
    "gates of groups in no JSON": ("gates", attribute("groups", "[[", "client_gates/final"), MODEL),
    "gates of negative groups": ("gates", attribute("groups", '[["conv1", -4]]', "client_gates/final"), MODEL),
    "gates of no group": ("gates", without("client_gates/final/gates"), MODEL),
    "the group of gates is a number": ("gates", instead("client_gates", array(3)), MODEL),
    # the model
    "finished without a model": ("masks", without("model"), MODEL),
    "a weight is missing": ("masks", without(WEIGHT), MODEL),
    "a weight of text": ("masks", instead(WEIGHT, array(["a"] * 36)), MODEL),
    "a weight of integers": ("masks", instead(WEIGHT, array(np.zeros(36, int))), MODEL),
    "a weight of another length": ("masks", instead(WEIGHT, array(np.zeros(35, np.float32))), MODEL),
    "a weight of no dtype": ("masks", attribute("dtype", "save", WEIGHT), MODEL),
    "a weight of a vast shape": ("masks", attribute("shape", "[1000000000000]", "model/mask/conv2.weight"), MODEL),
    "a weight's shape in no JSON": ("masks", attribute("shape", "(", WEIGHT), MODEL),
    "a flipped bit in a weight": ("masks", edited(WEIGHT, flip), MODEL),
    "a flipped bit in the model's mask": ("masks", edited("model/mask/conv2.weight", lambda bits: bits.__setitem__(0, bits[0] ^ 1)), MODEL),
    "another hash of the model": ("masks", attribute("weights_sha256", "0" * 64), MODEL),
    "a tensor more": ("masks", inside(lambda file: file["model"].__setitem__("w/more", [1.0])), MODEL),
}  # fmt: skip


# ---- who reads


def read_all(path: Path, held: bool = False) -> dict[str, Any]:
    """All that the reader gives, and under "refused" what it refuses. held: columns of one number a round are read at once."""
    found, refused = dict[str, Any](), list[BadInput]()

    def take(name: str, get: Callable[[], Any]) -> Any:
        try:
            found[name] = get()
        except BadInput as error:
            refused.append(error)
        return found.get(name)

    reader = RunReader(path).held() if held else RunReader(path)
    refused += [BadInput(f"{path}: {line}") for line in reader.damaged]
    for name, get in {"rounds": lambda: reader.rounds, "model": reader.model, "counts": reader.counts, "gates": reader.gates}.items():
        take(name, get)
    for name in ("attributes", "job", "plan"):
        take(name, lambda name=name: getattr(reader, name)) and found.pop(name)
    for dimension in ("client", "layer"):
        take(dimension, lambda dimension=dimension: reader.labels(dimension))
    for group, read in {"rounds": reader.column, "clients": reader.clients, "layers": reader.layers, "timing": reader.timing}.items():
        for name in take(f"names of {group}", lambda group=group: sorted(reader.names(group))) or ():
            take(f"{group}/{name}", lambda read=read, name=name: read(name))
    for r in range(found.get("rounds", -1) + 1):
        take(f"masks {r}", lambda r=r: reader.masks(r))
    return found | {"refused": refused}


def printed(act: Callable[[Console], Any], last: str = "") -> list[str]:
    """What is said about damage in the output, which has the line that begins with `last`."""
    text = io.StringIO()
    act(Console(file=text, width=120))
    lines = text.getvalue().splitlines()
    assert any(line.startswith(last) for line in lines)
    return [line for line in lines if line.startswith("left out: ") or "; what the run recorded cannot be read: " in line]


def compared(path: Path) -> list[str]:
    results.compared([path])
    return []


def analysed(path: Path) -> list[str]:
    found = fedsim_analysis.load(path)
    found.timing()
    for group, read in (("clients", found.clients), ("layers", found.layers)):
        for name in found.units(group):
            read(name)
    return []


def exported(path: Path) -> list[str]:
    client = None if "masks" in path.stem else 0
    return printed(lambda console: export(path, client, path.with_suffix(".pt"), console), "wrote ")


def labelled(path: Path, of: dict[str, Any]) -> list[str]:
    """What `fedsim_analysis.open` refuses; what it gives is right."""
    refused, tree = [], fedsim_analysis.open(path)
    for group in ("rounds", "clients", "layers", "timing"):
        for name, column in tree[group].data_vars.items():
            try:
                found = column.values[0]
            except run_file.Unreadable as error:
                refused.append(str(error))
            else:
                assert np.array_equal(found, of.get(f"{group}/{name}", found), equal_nan=True), name
    for name, mask in tree["masks"].data_vars.items():
        try:
            kept = mask.isel(run=0).values
        except run_file.Unreadable as error:
            refused.append(str(error))
        else:
            assert all(np.array_equal(kept[r], of[f"masks {r}"][f"mask/{name}"]) for r in range(len(kept)) if of[f"masks {r}"]), name
    return refused


def tabled(path: Path) -> list[str]:
    command.write(path, "csv", path.with_suffix(".csv"))
    return []


READERS: dict[str, Callable[[Path], list[str]]] = {  # what each says about the parts of a file that it cannot read
    "show": lambda path: printed(lambda console: show(path, console)),
    "compare": compared,
    "export": exported,
    "analysis": analysed,
}


@pytest.fixture(scope="module")
def right(bases: Path) -> dict[str, dict[str, Any]]:
    """What the reader gives of the sound files, which all others read too."""
    for name in BASES:
        for read in READERS.values():
            assert not read(bases / f"{name}.h5")
    return {name: read_all(bases / f"{name}.h5") for name in BASES}


def same(some: Any, other: Any) -> bool:
    if isinstance(some, dict):
        return some.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in some.items())
    if isinstance(some, tuple):
        return all(map(same, some, other))
    return np.array_equal(some, other, equal_nan=True) if isinstance(some, np.ndarray) else some == other


def by_reader() -> Iterator[Any]:
    """Every kind for all readers; by default one kind of four, and every second one for two readers."""
    for i, kind in enumerate(KINDS):
        yield pytest.param(kind, ALL, id=f"{kind}, all readers", marks=pytest.mark.full if i % 4 else ())
        if i % 4 == 2:
            yield pytest.param(kind, SHOWN, id=kind)


@pytest.mark.parametrize(("kind", "readers"), list(by_reader()))
def test_right_values_or_one_message(
    kind: str, readers: tuple[str, ...], bases: Path, right: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_file, "SETTLED", -1)  # nobody is writing to it
    base, damage, refuse = KINDS[kind]
    path = Path(shutil.copy(bases / f"{base}.h5", tmp_path))
    damage(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused: dict[str, list[str]] = {}
    try:
        found = read_all(path, held=readers != ALL)
        refused["reader"] = [str(error) for error in found.pop("refused")]
        wrong = [name for name, value in found.items() if name in right[base] and not same(value, right[base][name])]
        assert not [name for name in wrong if not name.startswith("names of")], kind
    except BadInput as error:
        refused["reader"] = [str(error)]
    for name in readers[1:]:
        try:
            refused[name] = [f"{path}: {line}" for line in READERS[name](path)[:3]]
        except (BadInput, run_file.Unreadable, FileNotFoundError) as error:
            refused[name] = [str(error)]
    assert {name for name, errors in refused.items() if errors} == set(refuse).intersection(readers)
    for name, act in {"open": lambda path: labelled(path, right[base]), "csv": tabled}.items():
        try:
            refused[name] = act(path)
        except (run_file.Unreadable, FileNotFoundError) as error:
            refused[name] = [str(error)]
    for message in (message for errors in refused.values() for message in errors):
        assert str(path) in message
        assert len(message) < 1000
        assert message.isprintable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY * 1024


def by_doctor() -> Iterator[Any]:
    """Every kind, with the checkpoints of the run beside it and without; by default a few."""
    for i, kind in enumerate(KINDS):
        for beside in (True, False):
            marks = () if i % 32 == 16 * beside else pytest.mark.full
            yield pytest.param(kind, beside, id=f"{kind}, {'with' if beside else 'without'} checkpoints", marks=marks)


@pytest.mark.parametrize(("kind", "beside"), list(by_doctor()))
def test_the_doctor_mends_it_or_leaves_it_with_a_reason(
    kind: str, beside: bool, bases: Path, right: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    base, damage, _ = KINDS[kind]
    path = Path(shutil.copy(bases / f"{base}.h5", tmp_path))
    if beside:
        shutil.copytree(bases / f"{base}.h5.checkpoint", tmp_path / f"{base}.h5.checkpoint")
    damage(path)
    before, said = content(path), io.StringIO()
    try:
        code = doctor(path, True, Console(file=said, width=200))
    except BadInput:
        code = 2
    if code == 2:
        assert content(path) == before
        return
    assert said.getvalue().replace("\n", "").isprintable()
    assert code == 0 or "it cannot be mended" in said.getvalue() or "it cannot be continued" in said.getvalue()
    if content(path) != before:
        found, known = read_all(path), right[base]
        refused = [str(error) for error in found.pop("refused")]
        assert code or not [error for error in refused if "holds no final weights" not in error]
        wrong = [name for name, value in found.items() if name in known and not same(value, known[name]) and not less(value, known[name])]
        assert not [name for name in wrong if not name.startswith("names of")], said.getvalue()
    after = content(path)
    assert doctor(path, True, Console(quiet=True)) == code
    assert content(path) == after


def content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def less(value: Any, known: Any) -> bool:
    """Whether a value lacks something of what is known, and says nothing else."""
    if isinstance(value, dict | list | tuple) or value is None:
        return not value or len(value[0]) == 0
    both = isinstance(value, np.ndarray) and value.shape == known.shape
    return both and np.array_equal(value[~np.isnan(value)], known[~np.isnan(value)])
