"""The page: HTML of a `Report`, with its style, plotly and all figures in it, so that it needs no network."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING

from fedsim_analysis.report import escaping
from fedsim_analysis.report.contents import Figure, Report

if TYPE_CHECKING:
    from jinja2 import Environment

MARK = '<meta name="generator" content="fedsim report">'  # by which a page of ours is known


def render(report: Report, pictures: Mapping[str, bytes]) -> str:
    """The page. `pictures`: name of a figure -> its SVG, for print and for readers without scripts."""
    scripts = (_plotly(), _text("page.js"))
    template = _environment().get_template("page.html.j2")
    sources = {name: _data_uri(picture) for name, picture in pictures.items()}
    return template.render(report=report, pictures=sources, style=_text("page.css"), scripts=scripts, policy=_policy(scripts), mark=MARK)


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("fedsim_analysis.report", ""),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: escaping.shown(value, escaping.LINES) if type(value) is str else value,
    )
    environment.filters["chart"] = _chart
    return environment


def _chart(figure: Figure) -> str:
    """What plotly draws, as JSON that can stand in a script element."""
    return escaping.script_json({"data": figure.chart["data"], "layout": figure.chart.get("layout", {}), "height": figure.height})


def _policy(scripts: tuple[str, ...]) -> str:
    """What a browser allows the page: these scripts, its own styles and pictures, and nothing from any network."""
    hashes = " ".join(f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def _data_uri(picture: bytes) -> str:
    return f"data:image/svg+xml;base64,{b64encode(picture).decode()}"


def _text(name: str) -> str:
    return files("fedsim_analysis.report").joinpath(name).read_text()


@cache
def _plotly() -> str:
    """plotly.js as one script without an end of an element in it."""
    script = files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    for mark in ("</script", "<!--", "<script"):
        if mark in script.lower():
            raise ValueError(f"plotly.js holds {mark!r}, which ends a script element early; install another version of plotly")
    return script.replace("\r\n", "\n")  # as a browser reads it, for its hash
