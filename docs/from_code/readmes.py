"""A README of the repository, or one section of it, in a page of the site."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath, relpath

ROOT = Path(__file__).parents[2]
PAGES = {  # the page that shows a file whole
    "CHANGELOG.md": "project/changelog",
    "CONTRIBUTING.md": "project/contributing",
    "README.md": "index",
    "analysis/README.md": "guide/reading",
    "fedsim/README.md": "project/map",
    "findings/README.md": "project/findings",
    "jobs/README.md": "guide/shipped_jobs",
    "jobs/ablations/README.md": "results/ablations",
    "jobs/bench/README.md": "results/speed",
    "jobs/bench/peers/README.md": "results/peers",
    "jobs/devices/README.md": "results/devices",
    "jobs/leaderboard/README.md": "results/leaderboard",
    "slurm/README.md": "guide/slurm",
}
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1`*\s*?$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^(#+) +(.+?) *$", re.MULTILINE)
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
NAMED = re.compile(r"(?<!\[)`([\w./-]*[\w-]+\.md)`(?!\])")


class NoSuchText(ValueError):
    """A page asks for a file or a section that is not there."""


def text_of(file: str, section: str, page: str, level: int) -> str:
    """The file (a path from the top of the repository), or what stands under one of its headings, for a page that lies at `page`.

    level: of the heading above it in the page, under which its own headings come; a whole file brings its own title where it is 0.
    """
    path = ROOT / file
    if not path.is_file():
        raise NoSuchText(f"there is no file {file}")
    text = path.read_text(encoding="utf-8")
    depth = 0
    if section:
        text, depth = under(text, section, file)
    elif level:
        text, depth = HEADING.sub("", text, count=1), 1
    return linked(_deeper(text.strip("\n"), level - depth), str(Path(file).parent), page)


def headings(text: str) -> list[tuple[int, int, int, str]]:
    """(begin, end, level, title) of each heading that stands in no code."""
    hidden = [(found.start(), found.end()) for found in FENCE.finditer(text)]
    every = ((found.start(), found.end(), len(found[1]), found[2]) for found in HEADING.finditer(text))
    return [each for each in every if not any(begin <= each[0] < end for begin, end in hidden)]


def under(text: str, section: str, file: str) -> tuple[str, int]:
    """What stands under a heading, up to the next of its level or above, and its level; under the title up to the first section."""
    known = headings(text)
    at = next((i for i, (_, _, _, title) in enumerate(known) if title == section), None)
    if at is None:
        raise NoSuchText(f"{file} has no section {section!r}. It has: {', '.join(title for *_, title in known)}")
    _, begin, level, _ = known[at]
    end = next((start for start, _, other, _ in known[at + 1 :] if other <= max(level, 2)), len(text))
    return text[begin:end], level


def _deeper(text: str, by: int) -> str:
    for begin, _, level, _ in reversed(headings(text)):
        text = f"{text[:begin]}{'#' * max(level + by, 1)}{text[begin + level :]}"
    return text


def linked(text: str, folder: str, page: str, own: bool = False) -> str:
    """Text of a file in `folder`, its links and pictures as they are seen from `page`; names of files that have a page become links.

    own: the text is the page's own, and its links are right as they are.
    """
    parts, last = [], 0
    for found in [*FENCE.finditer(text), None]:
        stretch = text[last : found.start()] if found else text[last:]
        if not own:
            stretch = LINK.sub(lambda link: f"{link[1]}{_target(link[2], folder, page)}{link[3]}", stretch)
        parts += [NAMED.sub(lambda name: _link(name[1], folder, page), stretch), found[0] if found else ""]
        last = found.end() if found else last
    return "".join(parts)


def _target(link: str, folder: str, page: str) -> str:
    if re.match(r"[a-z]+:|/", link):
        return link
    place = normpath(f"{folder}/{link}")
    if place in PAGES:
        return f"/{PAGES[place]}.md"
    if not (ROOT / place).exists():
        raise NoSuchText(f"a link to {link} in a file of {folder}/ leads nowhere")
    return relpath(place, f"docs/{Path(page).parent}")


def _link(name: str, folder: str, page: str) -> str:
    """A link to the page of a file, named from the top or from `folder`; the name alone where it has none, or is this page itself."""
    shown = next((PAGES[place] for place in (name, normpath(f"{folder}/{name}")) if place in PAGES), None)
    return f"`{name}`" if shown in (None, page) else f"[`{name}`](/{shown}.md)"
