"""The run of every line of the table in one process, which all others are compared with: made once, when a test first asks for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from cases import run
from filelock import FileLock

from fedsim.core.tree import Tree
from fedsim.costs import communication
from fedsim.costs.communication import Head


@dataclass
class Encoded:
    """What the real encoding gave for every size that the ledger charged during a run."""

    size: int = 0  # bytes
    errors: list[str] = field(default_factory=list)

    def check(self, header: list[Head], tree: Tree, known: Tree, last: Tree) -> None:
        """Encodes and decodes each tensor of the header."""
        for head in header:
            value = tree[head.key].float() if tree[head.key].is_floating_point() else tree[head.key]
            payload = communication._values(head, value, known, last.get(head.key)).tobytes()
            back = communication.decode(payload, [replace(head, dtype=value.dtype)], known, last)[head.key]
            if len(payload) != head.size:
                self.errors.append(f"{head.key}: {len(payload)} bytes are encoded, {head.size} charged")
            if not torch.equal(back, value):  # a pruned weight that is not 0 would be lost
                self.errors.append(f"{head.key}: decoded, it is another tensor")
            self.size += len(payload)


@contextmanager
def encoding_everything() -> Iterator[Encoded]:
    """Inside, whatever the ledger charges is encoded and decoded too. The run does not see it: its results stay as they are."""
    encoded, real = Encoded(), communication.heads

    def heads(tree: Tree, held: Tree | None = None, last: Tree | None = None) -> list[Head]:
        header = real(tree, held, last)
        encoded.check(header, tree, {**(held or {}), **tree}, last or {})
        return header

    communication.heads = heads
    try:
        yield encoded
    finally:
        communication.heads = real


@dataclass(frozen=True)
class Alone:
    """Run files by (method, way). The processes that share the tests share the files too: whoever asks first makes one, others wait."""

    folder: Path

    def __getitem__(self, pair: tuple[str, str]) -> Path:
        out, report = self._out(*pair), self._report(*pair)
        out.parent.mkdir(exist_ok=True)
        with FileLock(out.with_suffix(".lock")):
            if not report.exists():
                encoded = self._make(*pair, out)
                report.write_text(json.dumps(asdict(encoded)))
        return out

    def encoded(self, name: str) -> Encoded:
        """What the encoding gave in the serial run."""
        assert self[name, "serial"].exists()
        return Encoded(**json.loads(self._report(name, "serial").read_text()))

    def _make(self, name: str, way: str, out: Path) -> Encoded:
        threads = torch.get_num_threads()
        try:
            if way != "serial":
                assert run(name, way, self.folder, out) == 0
                return Encoded()
            with encoding_everything() as encoded:
                assert run(name, way, self.folder, out) == 0
            return encoded
        finally:
            torch.set_num_threads(threads)

    def _out(self, name: str, way: str) -> Path:
        return self.folder / "alone" / f"{name}-{way}.h5"

    def _report(self, name: str, way: str) -> Path:
        return self._out(name, way).with_suffix(".json")
