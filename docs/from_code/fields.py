"""Every field of a job, as `fedsim fields` lists them."""

from __future__ import annotations

from collections.abc import Iterable

from fedsim.cli.field_help import METHOD, SWEEP
from fedsim.cli.method_help import default
from fedsim.config import field_list
from fedsim.config.field_list import JobField
from from_code.markdown import code, plain, table


def fields() -> str:
    """Those above the first section, then each section; [method] and [sweep] have no fields of their own."""
    known = field_list.sections()
    parts = [f"## Above the first section\n\n{_table(known[''])}"]
    for name in filter(None, known):
        parts.append(f"(section-{name})=\n## `[{name}]`\n\n{plain(field_list.about(name))}\n\n{_table(known[name])}")
        if name == "train":
            parts.append(f"## `[method]`\n\n{plain(METHOD)}. They are on the page [Methods](/reference/methods.md).")
    return "\n\n".join([*parts, f"## `[sweep]`\n\n{plain(SWEEP)}"])


def _table(found: Iterable[JobField]) -> str:
    rows = ((code(each.name), plain(each.kind), code(default(each.default)), plain(each.meaning)) for each in found)
    return table(("field", "type", "default", "meaning"), rows)
