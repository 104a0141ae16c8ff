"""`fedsim devices`: the mixes that come with fedsim, one of them, and a file that is checked."""

from __future__ import annotations

from fedsim.devices.reading import built_in


def test_all_mixes_are_listed_with_their_kinds(fedsim) -> None:
    shown = fedsim("devices")
    assert shown.code == 0
    for name in built_in():
        assert name in shown.out


def test_a_mix_is_shown_with_its_figures_and_their_sources(fedsim) -> None:
    shown = fedsim("devices", "four_kinds")
    assert shown.code == 0
    assert "96.0 MFLOP/s" in shown.out
    assert "DS12110" in shown.out
    assert "single_board_computer" in shown.out.replace("\n", "")


def test_a_wrong_file_is_refused_with_what_is_wrong(fedsim, tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[kinds.phone]\nshare = 0.5\nflops = 1e9\nmemory = 1e8\ndown = 8e6\nup = 4e6\n")
    shown = fedsim("devices", str(path))
    assert shown.code == 2
    assert "the shares of its kinds sum to 0.5" in shown.err
    assert fedsim("devices", "five_kinds").code == 2
