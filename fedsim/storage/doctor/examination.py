"""One look at a run: its file, as readers read it, its checkpoints, and what stands beside them. Nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py
from fedsim_analysis import checked, checksums, run_file
from fedsim_analysis.watch.lock import Holder

from fedsim.errors import BadInput, naming_path
from fedsim.storage import checkpoint
from fedsim.storage.doctor import attributes, checkpoints, complaints, opening
from fedsim.storage.doctor.checkpoints import Folder, Stored
from fedsim.storage.doctor.complaints import FAULTS, MODEL, Checked
from fedsim.storage.doctor.findings import Findings
from fedsim.storage.doctor.rebuilding import rebuilt
from fedsim.storage.doctor.salvage import Hopeless, Sources, salvaged

GROUPS = ("rounds", "clients", "layers", "masks", "checksums", "partition", "timing")  # by which a run file is known
ASIDE = ".mended"  # behind the name of the run file, while it is written anew
FINAL = {MODEL, "client_gates/final"}  # what a run that has not finished lacks


@dataclass
class Examined:
    """What there is of a run, and how it could be mended."""

    path: Path
    folder: Folder
    findings: Findings = field(default_factory=Findings)
    checked: Checked | None = None  # None: readers refuse the whole file, or there is none
    refused: str = ""  # why
    too_new: list[Stored] = field(default_factory=list)  # checkpoints that the rows of the run file do not reach, where one before does
    content: bytes | None = None  # of the run file written anew; None: it need not or cannot be
    lost: list[str] = field(default_factory=list)  # what is not in that
    leftovers: list[Path] = field(default_factory=list)  # beside the run file

    @property
    def mendable(self) -> bool:
        return any(finding.mendable for finding in self.findings.wrong)

    @property
    def damage(self) -> list[str]:
        """What is wrong, but for leftovers."""
        return [str(finding) for finding in self.findings.wrong if not finding.harmless]


def examined(path: Path, sleep: Callable[[float], object], holder: Holder | None) -> Examined:
    """What there is of a run that `refuse_others` did not refuse. holder: who has the lock of the run file."""
    folder = checkpoints.folder_of(path)
    found = Examined(path, folder)
    writes = holder is not None and holder.writes is not False
    for _ in range(run_file.TRIES if writes else 1):
        found.checked, found.refused = read(path)
        if found.checked is not None and not found.checked.refused:
            break
        if writes:
            sleep(run_file.PAUSE)
    _look_whose(found)
    _look(found)
    checkpoints.look(folder, found.findings)
    _beside(found, holder)
    return found


def _look_whose(found: Examined) -> None:
    """Leaves out checkpoints of another job: they say nothing about this run file."""
    job = None if found.checked is None else found.checked.known.get("job_sha256")
    others = [each for each in found.folder.stored if isinstance(job, str) and each.job not in (None, job)]
    if others:
        advice = "put the right ones back; without them this run cannot go on"
        found.findings.add(f"the checkpoints in {found.folder.path.name} are of another job", advice, mendable=False)
        found.folder = replace(found.folder, stored=[each for each in found.folder.stored if each not in others])


def refuse_others(path: Path) -> None:
    """BadInput for what is no run file, and has no checkpoints either."""
    _refuse(path, checkpoints.folder_of(path))


def _refuse(path: Path, folder: Folder) -> None:
    """BadInput for what is no run file."""
    with naming_path(path):
        if path.is_dir():
            raise BadInput(f"{path} is a folder; give a run file in it")
        if path.is_symlink():
            raise BadInput(f"{path} is a link that leads to itself")
        if not path.exists():
            if not folder.stored and not folder.beginning:
                raise BadInput(f"there is no run file {path}")
            return
        if not path.is_file():
            raise BadInput(f"{path} is a pipe or a device, and no run file")
        with path.open("rb") as file:
            begin = file.read(len(opening.SIGNATURE))
    if begin != opening.SIGNATURE and not folder.stored and not folder.beginning:
        raise BadInput(f"{path} is no HDF5 file, and no run file therefore")
    try:
        with opening.anyhow(path) as (file, _):
            _refuse_others(path, file, bool(folder.stored))
    except opening.Unopened as error:
        if not folder.beginning:
            raise BadInput(f"{path} cannot be mended: {error}, and no copy of its beginning is kept in {folder.path}") from error


def _refuse_others(path: Path, file: h5py.File, known: bool) -> None:
    """BadInput for a file of another program, and of a newer format."""
    try:
        version, there = checked.attribute(file, "format_version"), set(file)
    except FAULTS:
        version, there = None, set(GROUPS) if known else set()
    if type(version) is int and version > run_file.FORMAT:
        raise BadInput(f"{path} is of format {version}, and this fedsim reads formats up to {run_file.FORMAT}; upgrade fedsim")
    if version is None and len(there.intersection(GROUPS)) < 3:
        raise BadInput(f"{path} is no run file of fedsim: it has {', '.join(sorted(map(str, there))[:5]) or 'nothing in it'}")


def read(path: Path) -> tuple[Checked | None, str]:
    """What readers give of the run file; None, with the reason, where they refuse all of it."""
    if not path.exists():
        return None, "the run file is gone"
    try:
        return run_file.read(path, complaints.of), ""
    except (run_file.Unreadable, run_file.Absent, FileNotFoundError) as error:
        return None, str(error).removeprefix(f"{path} ")


def _look(found: Examined) -> None:
    """What is wrong with the run file, and whether it can be mended."""
    known, newest = found.checked, found.folder.newest
    behind = known is not None and not known.finished and known.rounds < newest
    if known is not None and not known.refused and not behind:
        found.findings.seen[:0] = known.seen
        return
    hopeless, left = _not_to_mend(found), set[str]()
    if not hopeless:
        try:
            left = _write_anew(found)
        except (Hopeless, opening.Unopened) as error:
            hopeless = str(error)
    if known is None:
        advice = f"it cannot be mended: {hopeless}" if hopeless else "--mend writes it anew"
        found.findings.add(found.refused, f"no command can read this run; {advice}", not hopeless)
        return
    if not hopeless and not behind and len(left) >= len(known.refused):
        hopeless, found.content = "what could be written anew would lack it too", None
    for part, message in sorted(known.refused.items(), key=lambda item: item[0] != "attributes"):  # they are refused for others
        can = not hopeless and part not in left
        advice = "--mend writes it anew" if can else f"it cannot be mended: {hopeless or 'it is lost'}"
        found.findings.add(message, f"{_meaning(part)}; {advice}", can)
    if behind:
        _look_behind(found, known, hopeless)


def _write_anew(found: Examined) -> set[str]:
    """Writes the run file anew, in the memory; the parts of it that readers still refuse."""
    with _sources(found, found.folder.newest) as sources:
        whole = salvaged(sources)
    usable = [each for each in found.folder.whole if each.round <= whole.rounds]
    if whole.rounds < found.folder.newest and usable:
        found.too_new = [each for each in found.folder.whole if each.round > whole.rounds]
    if found.checked is not None and not found.checked.refused and found.too_new:
        return set()
    with _sources(found, usable[0].round if found.too_new else found.folder.newest) as sources:
        whole = salvaged(sources)  # once more: its rows are read as they are written
        found.content = rebuilt(whole)
    found.lost = whole.lost
    with opening.image(found.content) as file:
        return set(complaints.of(file).refused)


def _look_behind(found: Examined, known: Checked, hopeless: str) -> None:
    advice = "--mend makes rows of it in which nothing is measured"
    if found.too_new:
        advice = "--mend puts it aside, and the run goes on from the one before"
    what = f"the run file ends with round {known.rounds}, before the newest checkpoint (round {found.folder.newest})"
    found.findings.add(what, f"the run cannot be continued; {hopeless or advice}", not hopeless)


def _not_to_mend(found: Examined) -> str:
    """Why the run file had better be left as it is; empty where it had not."""
    known = found.checked
    if found.path.exists() and found.path.stat().st_size > opening.LARGEST:
        return f"it is too large ({found.path.stat().st_size:,} bytes; at most {opening.LARGEST:,}) to be written anew in the memory"
    if known is None or known.known.get("format_version", run_file.FORMAT) < run_file.RENAMED:
        return "" if known is None else "it is of format 1, which is read and not written any more"
    planned = known.known.get("rounds_planned", known.rounds)
    if known.refused and FINAL.issuperset(known.refused) and found.folder.newest < planned and _has_model(found.path):
        return "there is no checkpoint of the last round, from which its final weights could be made; all else in it can be read"
    return ""


def _has_model(path: Path) -> bool:
    return bool(run_file.read(path, lambda file: checked.item(file, "model") is not None))


def _meaning(part: str) -> str:
    """What it means that readers refuse this part."""
    if part in FINAL:
        return "the run cannot be exported; its columns can be read"
    if part.startswith(("rounds/", "timing/", "speed/", "layers/", "clients/")):
        return "this column is left out or refused; others can be read"
    if part.startswith(("masks/", "client_gates/")):
        return "these masks or gates are refused; columns can be read"
    return "commands refuse this run" if part in ("attributes", "checksums") else "commands that need it refuse this run"


def _beside(found: Examined, holder: Holder | None) -> None:
    """What stands beside the run file."""
    known, wrong, folder = found.checked, found.findings, found.folder
    if known is not None and not known.finished and known.rounds > 0 and not folder.whole:
        advice = (
            f"its {known.rounds} rounds can be read, but it cannot be continued; put the checkpoints back, or start it with another --out"
        )
        wrong.add(f"the run has not finished, and no whole checkpoint is in {folder.path.name}", advice, mendable=False)
    if holder is not None and holder.writes:
        wrong.seen.append(f"the run is being written by {holder}, so that all this is of this moment")
    elif holder is not None:
        end = "has ended" if holder.writes is False else "may have ended; that cannot be seen from here"
        advice = "the next run takes it over, --mend removes it" if holder.writes is False else "look there before you mend or continue"
        wrong.add(f"{found.path.name}.lock names {holder}, which {end}", advice, mendable=holder.writes is False, harmless=True)
    else:
        wrong.seen.append("no lock")
    if holder is None or not holder.writes:
        here = found.path.parent
        found.leftovers = [path for name in (".new", ASIDE) if (path := here / f"{found.path.name}{name}").is_file()]
    for path in found.leftovers:
        wrong.add(path.name, "a write that did not end left it; nothing reads it, --mend removes it", harmless=True)


@contextmanager
def _sources(found: Examined, newest: int) -> Iterator[Sources]:
    """The damaged file and the copy of its beginning, open. newest: the round of the checkpoint that the run would go on from."""
    beginning = checkpoints.beginning(found.folder.path / checkpoint.BEGINNING) if found.folder.beginning else None
    try:
        if not found.path.exists():
            yield Sources(None, beginning, newest)
            return
        with ExitStack() as held:
            try:
                file, stands = held.enter_context(opening.anyhow(found.path))
                if stands and attributes.is_broken(file):
                    file = held.enter_context(opening.without(found.path, checksums.NAME))
            except opening.Unopened:
                file, stands = None, False
            yield Sources(file, beginning, newest, stands)
    finally:
        if beginning is not None:
            beginning.close()
