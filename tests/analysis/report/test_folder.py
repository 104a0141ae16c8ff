"""The folder of figures: only ours is written to, what an earlier page left is removed, and its index obeys no text of run files."""

from __future__ import annotations

from pathlib import Path

import pytest
from fedsim_analysis.report import files, folder
from fedsim_analysis.report.contents import Call, Figure


def figure(name: str, caption: str = "Caption.") -> Figure:
    return Figure(name, f"Title of {name}", caption, {"data": []}, Call("accuracy", {"over": "bytes"}))


def write(place: Path, *names: str) -> None:
    index = folder.index("page", [figure(name) for name in names], "runs = …")
    folder.write(place, {name: {"svg": b"<svg/>", "pdf": b"%PDF"} for name in names}, index)


def test_figures_of_an_earlier_page_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    place = tmp_path / "report_figures"
    write(place, "one", "two")
    (place / "mine.svg").write_text("mine")
    folder.check(place)
    write(place, "two", "three")
    assert sorted(path.name for path in place.iterdir()) == ["README.md", "mine.svg", "three.pdf", "three.svg", "two.pdf", "two.svg"]


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="has files that fedsim report did not write"):
        folder.check(tmp_path)
    with pytest.raises(FileExistsError, match="is in the way"):
        folder.check(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    folder.check(tmp_path / "empty")
    folder.check(tmp_path / "none")


def test_an_index_names_no_file_outside_its_folder(tmp_path: Path) -> None:
    place, other = tmp_path / "report_figures", tmp_path / "other.svg"
    write(place, "one")
    other.write_text("mine")
    with (place / "README.md").open("a") as file:
        file.write("\nFiles: ../other.svg, notes.txt\n")
    (place / "notes.txt").write_text("mine")
    write(place, "two")
    assert other.exists()
    assert (place / "notes.txt").exists()
    assert not (place / "one.svg").exists()


def test_the_index_has_captions_and_commands_and_obeys_no_markup() -> None:
    text = folder.index("<b>`page`", [figure("one", "Of <img src=x>\n# fed*avg*\x1b[1m.")], "runs = open('```')")
    assert "Of \\<img src=x\\> \\# fed\\*avg\\*\\\\x1b\\[1m." in text
    assert "plots.accuracy(runs, over='bytes')" in text
    assert "`<b>page`" in text
    assert text.count("```") == 4
    assert "Files: one.svg, one.pdf" in text


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.mkdir()
    with pytest.raises(OSError, match=r"page\.html cannot be written"):
        files.put(target, b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
