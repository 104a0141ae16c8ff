"""Fills the places of a page that say where their text comes from.

```{from} README.md: Your own data      a section of a file
```{from} jobs/bench/README.md          a whole file
```{from} code: columns                 what the code says
"""

from __future__ import annotations

import re
from collections.abc import Callable

from from_code import commands, fields, methods, readmes, run_file

PLACE = re.compile(r"^```\{from\} ([^\n:]+?)(?:: ([^\n]+?))? *\n```$", re.MULTILINE)
OF_CODE: dict[str, Callable[[], str]] = {
    "arrays": run_file.arrays,
    "attributes": run_file.attributes,
    "columns": run_file.columns,
    "commands": commands.commands,
    "fields": fields.fields,
    "methods": methods.methods,
}


def filled(text: str, page: str) -> tuple[str, list[str]]:
    """The text of a page with its places filled, and the files that were read for it, as paths from the top of the repository."""
    files: list[str] = []
    parts, last = [], 0
    for found in PLACE.finditer(text):
        source, what = found[1], found[2] or ""
        above = [level for begin, _, level, _ in readmes.headings(text) if begin < found.start()]
        parts += [readmes.linked(text[last : found.start()], "docs", page, own=True), _text(source, what, page, above[-1] if above else 0)]
        files += [source] if source != "code" else []
        last = found.end()
    return "".join([*parts, readmes.linked(text[last:], "docs", page, own=True)]), files


def _text(source: str, what: str, page: str, level: int) -> str:
    if source != "code":
        return readmes.text_of(source, what, page, level)
    if what not in OF_CODE:
        raise readmes.NoSuchText(f"the code says nothing of {what!r}. There are: {', '.join(OF_CODE)}")
    return OF_CODE[what]()
