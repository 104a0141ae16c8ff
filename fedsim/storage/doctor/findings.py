"""What the doctor finds, one line each."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """Something that is wrong."""

    what: str
    means: str  # and what to do about it
    mendable: bool = True
    harmless: bool = False  # a leftover that nothing reads

    def __str__(self) -> str:
        return f"{self.what}: {self.means}"


@dataclass
class Findings:
    """What was found, and what was looked at and is sound."""

    wrong: list[Finding] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)

    def add(self, what: str, means: str, mendable: bool = True, harmless: bool = False) -> None:
        """Notes what is wrong, once: several parts may be refused for one reason."""
        if what not in {finding.what for finding in self.wrong}:
            self.wrong.append(Finding(what, means, mendable, harmless))


def summed(lost: list[str], most: int = 8) -> str:
    """What is lost, in one line: columns that are lost in the same rounds are named together."""
    together: dict[str, list[str]] = {}
    for line in lost:
        what, _, when = line.partition(" in ")
        together.setdefault(f" in {when}" if when and "/" in what else line, []).append(what)
    parts = [f"{_listed(names)}{when}" if when.startswith(" in ") else when for when, names in together.items()]
    return "; ".join(parts[:most]) + (f"; and {len(parts) - most} more" if len(parts) > most else "")


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names) if len(names) <= most + 1 else f"{', '.join(names[:most])} and {len(names) - most} more columns"
