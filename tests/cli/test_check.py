"""`fedsim check MODEL`: its table, its exit codes, and what it says about a MODEL that is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from captured_console import Fedsim
from small_job import FAKE, small_job

SMALL = ["--shape", "3,8,8", "--classes", "4"]
IMAGES = FAKE | {"channels": 3, "train_images": 40}
ALL = [
    "one client after the other",
    "clients stacked (packed)",
    "masks on sparse kernels",
    "channels closed by gates",
    "activation pruning",
]
OWN = """
import model_kinds
import torch


def kind(shape, classes):
    return model_kinds.EVERYWHERE["depthwise"]()


def attention(shape, classes):
    return model_kinds.EVERYWHERE["transformer block"]()


def bracketed(shape, classes):
    def forward(m, x):
        if torch._C._functorch.is_batchedtensor(x):
            raise ValueError("images are [batch, C], not [/stacked]")
        return m.head(m.conv(x))

    return model_kinds.Of(forward, conv=model_kinds.conv(), head=model_kinds.head())


def branching(shape, classes):
    return model_kinds.SERIAL["a branch on a value"][0]()


def recurrent(shape, classes):
    return model_kinds.SERIAL["LSTM"][0]()


def pair(shape, classes):
    return model_kinds.REFUSED["a tuple"][0]()


def raising(shape, classes):
    raise RuntimeError("no weights here")


def number(shape, classes):
    return 3


def without_sizes():
    return None


text = "a model"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a stranger: room.py with models, and broken.py."""
    (tmp_path / "room.py").write_text(OWN)
    (tmp_path / "types.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "job.toml").write_text(small_job(1, data=IMAGES, model={"factory": "room:kind"}))
    (tmp_path / "cnn.toml").write_text(small_job(1, data=IMAGES))
    monkeypatch.setenv("COLUMNS", "300")
    yield tmp_path
    for name in ("room", "broken"):
        sys.modules.pop(name, None)


def rows(out: str) -> dict[str, tuple[str, str]]:
    """Way -> (works, why not), from the table."""
    found: dict[str, tuple[str, str]] = {}
    for line in out.splitlines():
        if line.startswith("│"):
            way, works, why = (cell.strip() for cell in line.split("│")[1:-1])
            if way:
                found[way] = works, why
            else:  # the reason goes on
                last = list(found)[-1]
                found[last] = found[last][0], f"{found[last][1]} {why}"
    return found


@pytest.mark.parametrize("command", [["room.py:kind", *SMALL], ["room:kind", *SMALL], ["job.toml"], ["cnn.toml"]])
def test_a_model_that_works_in_every_way(fedsim: Fedsim, command: list[str]) -> None:
    ended = fedsim("check", *command)
    assert (ended.code, ended.err) == (0, "")
    found = rows(ended.out)
    assert list(found) == ALL
    assert {works for works, _ in found.values()} == {"yes"}
    assert "serial" not in ended.out


@pytest.mark.parametrize(
    ("model", "works", "said"),
    [
        ("bracketed", "yes no yes no yes", {ALL[1]: "images are [batch, C], not [/stacked]", ALL[3]: "cannot trace"}),
        ("branching", "yes no yes no yes", {ALL[1]: "takes a branch", ALL[3]: "torch.fx cannot trace it"}),
        ("recurrent", "yes no no no no", {ALL[1]: "aten::lstm.input", ALL[3]: "(LSTM) cannot be cut by gates"}),
        ("attention", "yes yes no no no", {ALL[2]: "read from outside of that layer", ALL[4]: "MultiheadAttention"}),
    ],
)
def test_a_model_that_works_in_some(fedsim: Fedsim, model: str, works: str, said: dict[str, str]) -> None:
    ended = fedsim("check", f"room.py:{model}", *SMALL)
    assert (ended.code, ended.err) == (0, "")
    found = rows(ended.out)
    assert " ".join(each for each, _ in found.values()) == works
    assert all(why == "" for each, why in found.values() if each == "yes")
    for way, words in said.items():
        assert words in found[way][1]
    spared = "note: FLOPs and masks are of convolutions and linear layers alone, not of the weights of "
    assert (spared in ended.out) == (model in ("recurrent", "attention"))
    assert (f"{spared}rnn (LSTM)" in ended.out) == (model == "recurrent")
    assert ("one client after the other (the serial fleet)" in ended.out) == (found[ALL[1]][0] == "no")


WRONG = {
    "no.py:make": "there is no file no.py",
    "room.py:nope": "module 'room' has no attribute 'nope'",
    "nothing.of_this_name:make": "No module named 'nothing'",
    "types.py:kind": "Python has another module called types",
    "broken.py:make": "No module named 'nothing_of_this_name'",
    "room.py:": "is written as package.module:function, or as file.py:function",
    ":make": "is written as package.module:function, or as file.py:function",
    "room.py": "Write room.py:function",
    "room": "room: no such job file",
    "missing.toml": "missing.toml: no such job file",
    "room.py:raising": 'model.factory = "room:raising" failed: RuntimeError: no weights here',
    "room.py:number": "it should give a torch.nn.Module",
    "room.py:text": "'str' object is not callable",
    "room.py:without_sizes": "unexpected keyword argument 'shape'",
    "room.py:pair": "forward gives a tuple in training mode",
    "room.py:kind --classes 9": "the model has 4 outputs, and the data have 9 classes",
    "room.py:kind --shape 1,8,8": "0 (Conv2d) fails on images of shape (4, 1, 8, 8)",
    "room.py:kind --shape 3,8": "--shape 3,8: should be C,H,W",
    "room.py:kind --shape 3,x,8": "--shape 3,x,8: should be C,H,W",
    "room.py:kind --shape 3,0,8": "--shape 3,0,8: should be C,H,W",
    "room.py:kind --set train.lr=1": "room.py:kind is a function",
    "job.toml --shape 3,8,8": "--shape is for a function",
    "job.toml --classes 4": "--classes is for a function",
    "job.toml --set model.factory=room:pair": 'job.toml: model.factory = "room:pair": forward gives a tuple',
    "job.toml --set model.factory=room:number": 'job.toml: model.factory = "room:number" gave a int',
    "cnn.toml --set model.name=cnm": "did you mean 'cnn'?",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_one_line(refuses: Callable[..., str], words: str) -> None:
    model, *options = words.split()
    message = refuses("check", model, *(options if options or not model.partition(":")[1] else SMALL))
    assert WRONG[words] in message
    assert message.count("\n") == 1


def test_classes_below_two_are_a_usage_error(refuses: Callable[..., str]) -> None:
    assert "--classes" in refuses("check", "room.py:kind", "--classes", "1")


@pytest.mark.full
@pytest.mark.processes
def test_as_a_command_of_its_own(folder: Path) -> None:
    """Nothing of torch's advice to its developers is on the error stream."""
    command = [sys.executable, "-m", "fedsim", "check", "room.py:attention", *SMALL]
    fixtures = str(Path(__file__).parents[1] / "fixtures")
    (folder / "model_kinds.py").write_text((Path(fixtures) / "model_kinds.py").read_text())
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert rows(ended.stdout)[ALL[1]] == ("yes", "")
