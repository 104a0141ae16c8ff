"""How Sphinx builds the site: `make docs`. Texts that stand elsewhere in the repository come from there (`from_code/filling.py`)."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields, is_dataclass
from itertools import takewhile
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "analysis"), str(ROOT / "docs")]

from docutils import nodes
from from_code.filling import filled
from from_code.readmes import NoSuchText
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.util import logging

from fedsim.config import method_source

project, author = "fedsim", "the fedsim developers"
version = release = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]  # type: ignore[index]
copyright = "the fedsim developers, MIT license"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["from_code"]

html_theme = "furo"  # plain, with a dark form, and it fetches nothing from elsewhere
html_title = f"fedsim {version}"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_copy_source = html_show_sourcelink = False
pygments_style, pygments_dark_style = "tango", "monokai"

myst_heading_anchors = 4  # links to #headings, as they are written in the README files
myst_enable_extensions = ["attrs_block"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types in signatures name classes that have no entry on the site

highlight_language = "none"  # of blocks that name none: text as a terminal shows it
smartquotes = False  # texts hold values to copy
default_role = "code"  # docstrings write `code`, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
napoleon_custom_sections = [("Arguments", "params_style")]

SAY = logging.getLogger(__name__)
BAR = re.compile(r"(?<!\\)\|(?![^`]*`(?:[^`]*`[^`]*`)*[^`]*$)")  # not in `code`
ELSEWHERE = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^"']+""")


def fill(app: Sphinx, page: str, text: list[str]) -> None:
    """Before Markdown is read: the places of a page get their texts."""
    try:
        text[0], files = filled(text[0], page)
    except NoSuchText as error:
        SAY.warning("%s", error, location=page)
        return
    for file in files:
        app.env.note_dependency(str(ROOT / file))


def as_it_reads(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text, in which |w| is an absolute value; a module's table in Markdown stands in a page."""
    if what == "module":
        lines[:] = list(takewhile(lambda line: not line.startswith("| "), lines))
    if "Returns:" in lines:  # else Napoleon takes what precedes a colon for the name of a type
        at = lines.index("Returns:")
        lines[at : at + 2] = [f":returns: {lines[at + 1].strip()}"]
    if isinstance(thing, type) and is_dataclass(thing):
        meanings = method_source.comments(dedent(inspect.getsource(thing)))
        lines += ["", *(f":param {each.name}: {meanings[each.name]}" for each in fields(thing) if meanings.get(each.name)), ""]
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...", ".. ")):
            lines[i] = BAR.sub(r"\|", line)


def with_dashes(app: Sphinx, page: nodes.document) -> None:
    """Sphinx writes two hyphens between an argument and its meaning, for the smart quotes that are off here."""
    for content in page.findall(addnodes.desc_content):
        for text in [text for text in content.findall(nodes.Text) if text == " -- "]:
            text.parent.replace(text, nodes.Text(" – "))


def needs_no_network(app: Sphinx, fault: Exception | None) -> None:
    """A page that would load a script, a font or a picture from elsewhere is an error."""
    if fault is None and app.builder.format == "html":
        pages = Path(app.outdir).rglob("*.html")
        loads = [f"{page.name}: {found[0]}" for page in pages for found in ELSEWHERE.finditer(page.read_text(encoding="utf-8"))]
        if loads:
            raise SphinxError("pages load from elsewhere: " + "; ".join(loads[:5]))


def setup(app: Sphinx) -> None:
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", as_it_reads, priority=400)  # before Napoleon
    app.connect("doctree-read", with_dashes)
    app.connect("build-finished", needs_no_network)
