"""Text of run files on a page: markup, terminal escapes and signs that turn the direction of reading are shown as they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fedsim_analysis.report.escaping import LINES, label, script_json, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é 名", "plain é 名"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("one\ntwo\r", "one\\ntwo\\r"),
        ("abc\u202edcba\u2066", "abc\\u202edcba\\u2066"),
        ("a\u00a0b\u2028", "a\u00a0b\\u2028"),
        ("\ud800", "\\ud800"),
    ],
)
def test_signs_that_steer_are_written_out(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_ends_of_lines_stay_where_they_are_wanted() -> None:
    assert shown("a\n\tb\r\x1b", LINES) == "a\n\tb\\r\\x1b"


def test_labels_of_curves_hold_no_markup() -> None:
    assert label("<b>x</b> & \x1b") == "&lt;b&gt;x&lt;/b&gt; &amp; \\x1b"
    assert label("abcdef", 4) == "abc…"
    assert label("<<<<<", 4) == "&lt;&lt;&lt;…"  # cut before it is escaped


def test_json_cannot_end_its_script() -> None:
    value = {
        "a": "</script><!--<script>&\u2028\u2029",
        "b": [np.float64(0.1) / 3, np.nan, np.inf, np.int64(3), True, None],
        "c": np.arange(2),
    }
    text = script_json(value)
    assert not {"<", ">", "&", "\u2028", "\u2029"} & set(text)
    assert json.loads(text) == {"a": value["a"], "b": [0.0333333, None, None, 3, True, None], "c": [0, 1]}
