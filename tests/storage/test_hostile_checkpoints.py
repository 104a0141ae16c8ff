"""Checkpoints that somebody made to do harm: each is an error, within little memory, and nothing outside of their folder is touched."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.errors import BadInput
from fedsim.storage import checkpoint, manifest
from fedsim.storage.manifest import seal, sum_of

MEMORY = 600  # MB that reading such a file may take
STATE = "000001.state.safetensors"
READ = """
import resource, sys
from pathlib import Path
from fedsim.errors import BadInput
from fedsim.storage import checkpoint, manifest
from fedsim.storage.doctor.checkpoints import folder_of

held = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[2]) * 10**6,) * 2)
for kind, run in zip(sys.argv[3::2], map(Path, sys.argv[4::2])):
    try:
        checkpoint.latest(checkpoint.folder_of(run))
        print(kind, "is read")
    except BadInput as error:
        assert len(str(error)) < 600, kind
    whole = kind.startswith(tuple(sys.argv[1].split(", ")))
    assert all(each.reason or whole for each in folder_of(run).stored), kind
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = checkpoint.folder_of(tmp_path / "run.h5")
    checkpoint.save(found, 1, {"w": torch.ones(3)}, {"plan": "{}"}, {5: {"w/a": torch.ones(2)}})
    (tmp_path / "outside").write_text("of somebody")
    return found


def sealed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        found = json.loads((folder / "000001.json").read_text())["manifest"]
        change(found)
        (folder / "000001.json").write_bytes(seal(found))

    return act


def with_state(content: bytes) -> Callable[[Path], None]:
    """Other tensors, for which the manifest vouches."""

    def act(folder: Path) -> None:
        (folder / STATE).write_bytes(content)
        sealed(lambda found: found["files"].update({STATE: sum_of(content)}))(folder)

    return act


def tensors(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def sparse(folder: Path) -> None:
    """A terabyte of which nothing lies on the disk."""
    os.truncate(folder / STATE, 2**40)
    sealed(lambda found: found["files"].update({STATE: {"bytes": 2**40, "sha256": "0" * 64}}))(folder)


def large_manifest(folder: Path) -> None:
    with (folder / "000001.json").open("r+b") as file:
        file.truncate(manifest.TEXT + 1)


def text(content: bytes) -> Callable[[Path], None]:
    """Another manifest."""
    return lambda folder: (folder / "000001.json").write_bytes(content) and None


def outside(name: str) -> Callable[[Path], None]:
    """A manifest that names a file elsewhere, with its right hash, and a copy to make it from."""

    def act(folder: Path) -> None:
        known = sum_of(b"of somebody")
        sealed(lambda found: (found["files"].update({name: known}), found["kept"].update({name: [5]})))(folder)

    return act


CLAIM = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
OVERFLOW = json.dumps({"w": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 4]}}).encode()
MANY = json.dumps({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}).encode()
HOSTILE: dict[str, Callable[[Path], None]] = {
    "a manifest too large": large_manifest,
    "a manifest of many lists": lambda folder: (
        (folder / "000001.json").write_bytes(b"[" + b"[]," * (manifest.NESTED + 1) + b"[]]") and None
    ),
    "a manifest nested deeply": lambda folder: (folder / "000001.json").write_bytes(b'{"manifest":' * 100_000) and None,
    "a state nested deeply": sealed(lambda found: found.update(state=json.loads("[" * 900 + "]" * 900))),
    "a file elsewhere": outside("../../outside"),
    "an absolute file": outside("/etc/hostname"),
    "a file that hides": outside("000001.kept.safetensors/../../outside"),
    "a round that is another": sealed(lambda found: found.update(round=10**30)),
    "a round that is a truth value": sealed(lambda found: found.update(round=True)),
    "files that are texts": sealed(lambda found: found["files"].update({STATE: "all"})),
    "bytes that are negative": sealed(lambda found: found["files"][STATE].update(bytes=-1)),
    "clients that are texts": sealed(lambda found: found["kept"].update({"000001.kept.safetensors": ["../5"]})),
    "clients that are a number": sealed(lambda found: found["kept"].update({"000001.kept.safetensors": 10**9})),
    "a file of a terabyte": sparse,
    "tensors of a vast shape": with_state(tensors(CLAIM)),
    "tensors whose shape overflows": with_state(tensors(OVERFLOW, data=bytes(4))),
    "a header longer than the file": with_state(tensors(b"{}", 2**62)),
    "a header of 4 GB": with_state(tensors(b"{}", 2**32)),
    "a header of many tensors": with_state(tensors(MANY)),
    "a class of Python": sealed(lambda found: found.update(state={"of": "argparse:Namespace", "fields": {}})),
    "a class that is imported by nobody": sealed(lambda found: found.update(state={"of": "antigravity:geohash", "fields": {}})),
    "a name with an escape": sealed(lambda found: found.update(state={"of": "\x1b[2J:[red]", "fields": {}})),
}
WHOLE = ("a state", "a class", "a name", "tensors", "a header")  # their files are as the manifest says; what is in them is refused later


@pytest.mark.processes
def test_hostile_checkpoints_are_errors_within_little_memory(folder: Path) -> None:
    """Of a process that has little; which reads them as a run that goes on does, and as the doctor."""
    runs: list[str] = []
    for i, (kind, act) in enumerate(HOSTILE.items()):
        copy = checkpoint.folder_of(folder.with_name(f"{i}.h5"))
        shutil.copytree(folder, copy)
        act(copy)
        runs += [kind, str(folder.with_name(f"{i}.h5"))]
    before = sorted(path.name for path in folder.parent.iterdir())
    command = [sys.executable, "-c", READ, ", ".join(WHOLE), str(MEMORY), *runs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (folder.parent / "outside").read_text() == "of somebody"
    assert sorted(path.name for path in folder.parent.iterdir()) == before


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if "many" not in kind])
def test_it_is_one_message_here_too(kind: str, folder: Path) -> None:
    HOSTILE[kind](folder)
    with pytest.raises(BadInput, match=r"no checkpoint in .* is whole") as refused:
        checkpoint.latest(folder)
    assert len(str(refused.value)) < 600
    assert "antigravity" not in sys.modules
