"""checkpoint: whatever happens to a save, `latest` gives the newest or the previous state, never a mixture."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.errors import BadInput
from fedsim.storage import checkpoint
from fedsim.storage.checkpoint import Checkpoint, clear, folder_of, save
from fedsim.storage.manifest import seal

latest = partial(checkpoint.latest, own=[__name__])


@dataclass(frozen=True)
class State:
    shared: dict[str, Tensor]
    round: int


def state(r: int) -> State:
    return State({"w/a": torch.full((3, 2), float(r)), "mask/a": torch.arange(6).reshape(3, 2) % 2 == r % 2, "n/": torch.tensor(r)}, r)


def touched(r: int) -> dict[int, dict[str, Tensor]]:
    """Clients r and r + 1 were in the cohort of round r."""
    return {k: {"w/b": torch.tensor([float(r), k]), "mask/a": torch.tensor(True)} for k in (r, r + 1)}


def kept_after(r: int) -> dict[int, float]:
    """client -> round of its last visit, by replaying the visits."""
    return {k: s for s in range(r + 1) for k in (s, s + 1)}


def write(folder: Path, r: int) -> None:
    save(folder, r, state(r), {"plan": "reference", "round": r}, touched(r))


def assert_is(found: Checkpoint | None, r: int) -> None:
    """`found` is the checkpoint of round r, in every part."""
    assert found is not None
    assert found.round == r == found.state.round
    assert found.extra == {"plan": "reference", "round": r}
    assert found.state.shared.keys() == state(r).shared.keys()
    assert all(torch.equal(found.state.shared[key], value) for key, value in state(r).shared.items())
    assert {k: tree["w/b"].tolist() for k, tree in found.kept.items()} == {k: [s, k] for k, s in kept_after(r).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rounds 0 to 3 were saved here."""
    for r in range(4):
        write(tmp_path / "run.checkpoint", r)
    return tmp_path / "run.checkpoint"


def test_the_folder_stands_beside_the_run_file() -> None:
    assert folder_of("runs/a.h5") == Path("runs/a.h5.checkpoint")


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "run.checkpoint") is None
    (tmp_path / "notes.json").write_text("{}")
    assert latest(tmp_path) is None


def test_the_newest_round_comes_back_whole(folder: Path) -> None:
    assert_is(latest(folder), 3)


def test_untouched_kept_states_are_referred_to_not_rewritten(folder: Path) -> None:
    before = {path.name: path.stat().st_ino for path in folder.glob("*.kept*")}
    save(folder, 4, state(4), {"plan": "reference", "round": 4})
    after = {path.name: path.stat().st_ino for path in folder.glob("*.kept*")}
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {"000003.kept.copy.safetensors"}  # which two checkpoints depend on now
    found = latest(folder)
    assert found is not None
    assert {k: int(tree["w/b"][0]) for k, tree in found.kept.items()} == kept_after(3)


def test_only_what_the_two_newest_manifests_need_stays(folder: Path) -> None:
    save(folder, 4, state(4), {}, {k: {"w/b": torch.zeros(1)} for k in range(5)})
    save(folder, 5, state(5), {})
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [f"000004{suffix}" for suffix in (".json", ".state.safetensors", ".kept.safetensors", ".kept.copy.safetensors")]
        + ["000005.json", "000005.state.safetensors"]
    )


def test_kept_trees_are_read_on_demand_and_belong_to_the_reader(folder: Path) -> None:
    found = latest(folder)
    assert found is not None
    found.kept[0]["w/b"].zero_()
    assert found.kept[0]["w/b"].tolist() == [0.0, 0.0] == [kept_after(3)[0], 0]
    found.kept[4]["w/b"].zero_()
    assert found.kept[4]["w/b"].tolist() == [3.0, 4.0]
    assert list(found.kept[4]) == ["w/b", "mask/a"]  # the order they were given in
    with pytest.raises(KeyError):
        found.kept[99]


def test_a_client_may_keep_nothing(tmp_path: Path) -> None:
    save(tmp_path, 0, None, {}, {7: {}})
    found = latest(tmp_path)
    assert found is not None
    assert found.state is None
    assert dict(found.kept) == {7: {}}


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    flat = torch.arange(6.0)
    save(tmp_path, 0, {"all": flat, "head": flat[:2], "again": flat.view(2, 3), "row": flat.view(2, 3).T}, {})
    found = latest(tmp_path)
    assert found is not None
    assert torch.equal(found.state["all"], flat)
    assert torch.equal(found.state["head"], flat[:2])
    assert torch.equal(found.state["again"], flat.view(2, 3))
    assert torch.equal(found.state["row"], flat.view(2, 3).T)


@contextmanager
def each_step(folder: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """A copy of the folder just before every sync, rename and removal: what a kill there leaves."""
    copies: list[Path] = []

    def first(act: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            copies.append(shutil.copytree(folder, into / f"{len(copies):03d}"))
            return act(*args, **kwargs)

        return watched

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", first(os.fsync))
        patch.setattr(Path, "rename", first(Path.rename))
        patch.setattr(Path, "unlink", first(Path.unlink))
        yield copies


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


damages = pytest.mark.parametrize("damage", [delete, truncate, empty, corrupt])


def test_a_kill_at_any_step_of_a_save_leaves_this_round_or_the_one_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with each_step(folder, tmp_path / "cuts", monkeypatch) as copies:
        write(folder, 4)
    assert len(copies) >= 8
    rounds = []
    for copy in copies:
        found = latest(copy)
        assert found is not None
        rounds.append(found.round)
        assert_is(found, found.round)
        write(copy, found.round + 1)  # and the run goes on from there
        assert_is(latest(copy), found.round + 1)
    assert rounds == sorted(rounds)
    assert set(rounds) == {3, 4}


@damages
def test_files_in_flight_may_be_lost_in_any_way(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any) -> None:
    settled = {path.name for path in folder.iterdir()}
    with each_step(folder, tmp_path / "cuts", monkeypatch) as copies:
        write(folder, 4)
    for copy in copies:
        for name in sorted({path.name for path in copy.iterdir()} - settled):
            hurt = shutil.copytree(copy, tmp_path / "hurt", dirs_exist_ok=False)
            damage(hurt / name)
            found = latest(hurt)
            assert found is not None
            assert found.round in (3, 4)
            assert_is(found, found.round)
            shutil.rmtree(hurt)


@damages
def test_damage_to_one_file_loses_at_most_one_checkpoint(folder: Path, tmp_path: Path, damage: Any) -> None:
    fallen = {}
    for path in sorted(folder.iterdir()):
        hurt = shutil.copytree(folder, tmp_path / "hurt")
        damage(hurt / path.name)
        found = latest(hurt)
        assert found is not None
        assert_is(found, found.round)
        write(hurt, found.round + 1)
        assert_is(latest(hurt), found.round + 1)
        fallen[path.name] = found.round
        shutil.rmtree(hurt)
    assert {name for name, r in fallen.items() if r == 2} == {"000003.json", "000003.state.safetensors", "000003.kept.safetensors"}
    assert sum(".copy." in name for name in fallen) == 3


def test_a_damaged_file_of_kept_states_is_made_anew_from_its_copy(folder: Path) -> None:
    name, other = "000001.kept.safetensors", "000002.kept.copy.safetensors"
    before = {path: (folder / path).read_bytes() for path in (name, other)}
    for path in before:
        corrupt(folder / path)
    assert_is(latest(folder), 3)
    assert {path: (folder / path).read_bytes() for path in before} == before
    corrupt(folder / name)
    corrupt(folder / name.replace(".kept", ".kept.copy"))
    with pytest.raises(BadInput, match=r"no checkpoint in .* is whole \(000003.json: 000001.kept.safetensors is damaged or missing"):
        latest(folder)


def sealed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The newest manifest with a change, and a hash that fits."""

    def act(folder: Path) -> None:
        manifest = json.loads((folder / "000003.json").read_text())["manifest"]
        change(manifest)
        (folder / "000003.json").write_bytes(seal(manifest))

    return act


def of_kind(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something else in the place of a file."""

    def act(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return act


STATE = "000003.state.safetensors"
DAMAGED: dict[str, Callable[[Path], None]] = {
    "a manifest of zeros": of_kind("000003.json", lambda path: path.write_bytes(bytes(1000))),
    "a manifest of no UTF-8": of_kind("000003.json", lambda path: path.write_bytes(b"\xff\xfe{}")),
    "a manifest that is a list": of_kind("000003.json", lambda path: path.write_text("[]")),
    "a manifest nested deeply": of_kind("000003.json", lambda path: path.write_text("[" * 200_000)),
    "a manifest that is a folder": of_kind("000003.json", Path.mkdir),
    "a manifest that is a pipe": of_kind("000003.json", os.mkfifo),
    "a manifest that links to itself": of_kind("000003.json", lambda path: path.symlink_to(path)),
    "tensors that are a folder": of_kind(STATE, Path.mkdir),
    "tensors that are a pipe": of_kind(STATE, os.mkfifo),
    "tensors of zeros": of_kind(STATE, lambda path: path.write_bytes(bytes(1000))),
    "a manifest without files": sealed(lambda manifest: manifest.pop("files")),
    "a manifest without kept states": sealed(lambda manifest: manifest.pop("kept")),
    "a manifest without a round": sealed(lambda manifest: manifest.pop("round")),
    "a round that is text": sealed(lambda manifest: manifest.update(round="three")),
    "a format that is text": sealed(lambda manifest: manifest.update(format_version="two")),
    "files that are a list": sealed(lambda manifest: manifest.update(files=[1])),
    "kept states of no clients": sealed(lambda manifest: manifest.update(kept={"a": 3})),
    "a module that is gone": sealed(lambda manifest: manifest["state"].update(of="gone.module:State")),
    "a class that is gone": sealed(lambda manifest: manifest["state"].update(of="fedsim.fleet.plan:Gone")),
    "a class that is no state": sealed(lambda manifest: manifest["state"].update(of="pathlib:Path")),
    "a class that is no text": sealed(lambda manifest: manifest["state"].update(of=3)),
    "a field of a later version": sealed(lambda manifest: manifest["state"]["fields"].update(later=1)),
    "a field that is gone": sealed(lambda manifest: manifest["state"]["fields"].pop("round")),
    "a tensor that is gone": sealed(lambda manifest: manifest["state"]["fields"].update(round={"tensor": "nowhere"})),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_whatever_is_wrong_with_the_newest_the_one_before_is_taken(kind: str, folder: Path) -> None:
    DAMAGED[kind](folder)
    found = latest(folder)
    assert_is(found, 2)
    assert found is not None
    assert len(found.passed) == 1
    assert found.passed[0].startswith("000003.json: ")
    assert "class" not in kind or "gone" not in kind or "was it renamed or moved?" in found.passed[0]


def test_a_checkpoint_that_is_refused_gives_way_too(folder: Path) -> None:
    def check(found: Checkpoint) -> None:
        if found.round == 3:
            raise ValueError("it is not liked")

    found = latest(folder, check=check)
    assert_is(found, 2)
    assert found is not None
    assert found.passed == ("000003.json: it is not liked",)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run.checkpoint").write_text("")
    with pytest.raises(BadInput, match="is a file, and the checkpoints need a folder of this name"):
        latest(tmp_path / "run.checkpoint")


def test_the_run_goes_on_after_a_fall_back(folder: Path) -> None:
    corrupt(folder / "000003.state.safetensors")
    assert_is(latest(folder), 2)
    for r in (3, 4, 5):
        write(folder, r)
        assert_is(latest(folder), r)
    assert sorted(path.name for path in folder.glob("*.json")) == ["000004.json", "000005.json"]


def test_a_damaged_later_manifest_of_another_pace_is_removed(folder: Path) -> None:
    shutil.copy(folder / "000003.json", folder / "000009.json")
    corrupt(folder / "000009.json")
    write(folder, 4)
    assert sorted(path.name for path in folder.glob("*.json")) == ["000003.json", "000004.json"]


def test_a_flipped_digit_in_a_manifest_is_seen(folder: Path) -> None:
    text = (folder / "000003.json").read_text()
    (folder / "000003.json").write_text(text.replace('"round": 3', '"round": 2'))
    assert_is(latest(folder), 2)


def test_a_newer_format_says_which_version_wrote_it(folder: Path) -> None:
    manifest = json.loads((folder / "000003.json").read_text())["manifest"]
    (folder / "000003.json").write_bytes(seal({**manifest, "format_version": 99, "fedsim_version": "7.1"}))
    with pytest.raises(BadInput, match=r"written by fedsim 7\.1 in format 99"):
        latest(folder)


def test_clear_removes_the_checkpoints_and_nothing_else(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    clear(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    clear(folder)
    assert not folder.exists()
    clear(folder)


def test_no_two_runs_share_a_folder() -> None:
    names = ["runs/a.h5", "runs/a.hdf5", "runs/a", "runs/lr0.1", "runs/lr0.5", "runs/lr0.1.h5"]
    assert len({folder_of(name) for name in names}) == len(names)


def test_a_file_where_the_folder_should_be_is_refused_by_a_new_run_too(tmp_path: Path) -> None:
    (tmp_path / "run.h5.checkpoint").touch()
    with pytest.raises(BadInput, match="is a file, and the checkpoints need a folder of this name"):
        clear(tmp_path / "run.h5.checkpoint")


def test_a_folder_that_cannot_be_written_is_refused_by_one_message(tmp_path: Path) -> None:
    """The file system of the kernel takes no files, not even from root."""
    folder = tmp_path / "run.h5.checkpoint"
    folder.symlink_to("/sys/kernel")
    for write_there in (lambda: checkpoint.check_writable(folder), lambda: save(folder, 1, state(1), None)):
        with pytest.raises(BadInput, match=r"checkpoint cannot take checkpoints: .* \(.*\); mend that, or choose another --out"):
            write_there()


def test_a_folder_in_the_place_of_a_file_is_refused_and_left_alone(folder: Path) -> None:
    checkpoint.check_writable(folder)
    before = sorted(folder.iterdir())
    (folder / "000009.json.new").mkdir()
    with pytest.raises(BadInput, match=r"cannot take checkpoints: Is a directory \(.*000009\.json\.new\)"):
        save(folder, 9, state(9), None)
    (folder / "000009.json.new").rmdir()
    assert set(before) <= set(folder.iterdir())


def test_states_are_kept_from_the_checkpoint_that_the_run_began_with(tmp_path: Path) -> None:
    """A newer one that is damaged, and was passed over, is not what the next one stands on: here the run saves less often now."""
    for r in range(4):
        write(tmp_path, r)
    for damaged in tmp_path.glob("000003.*.safetensors"):
        damaged.write_bytes(b"")
    assert_is(latest(tmp_path), 2)
    visited = touched(3) | touched(4) | touched(5)
    save(tmp_path, 5, state(5), {"plan": "reference", "round": 5}, visited, 2)
    assert_is(latest(tmp_path), 5)
    assert {path.stem for path in tmp_path.glob("*.json")} == {"000002", "000005"}


def test_a_manifest_that_is_damaged_while_the_run_goes_on_is_not_passed_over(tmp_path: Path) -> None:
    """The one before it knows other kept states."""
    for r in range(3):
        write(tmp_path, r)
    (tmp_path / "000002.json").write_text("{}")
    with pytest.raises(BadInput, match=r"000002\.json is damaged on the disk .* restart the run with --resume must"):
        save(tmp_path, 3, state(3), {}, touched(3), 2)
    assert_is(latest(tmp_path), 1)
    save(tmp_path, 0, state(0), {"plan": "reference", "round": 0}, touched(0), -1)  # begun anew, whatever lies there
