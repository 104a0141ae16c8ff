"""Which runs are pairs by common random numbers, and which group each group is held against.

A job's seed decides who holds which images, the cohorts, the batches and the first weights, whatever the method. So two runs are a pair
where all of these say so:

- `seed` is the same;
- `partition_sha256` is the same: the images of each client, of its test shard and of the server. It is of positions in the data, so the
  fields of [data] that say which images there are must be the same too;
- [cohort] is the same, and the clients that took part in round 1, or in the last round that both have done, are the same (a method may ask
  further clients in a round of its own, such as one that prunes);
- the first weights are: the fields of [model] that they follow from are the same, and if the model is the user's own, that code too. A
  method that pretrains, selects or prunes begins from these weights.

Local training ([train]) may differ: it is then what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsim_analysis.comparison import jobs
from fedsim_analysis.comparison.grouping import Group
from fedsim_analysis.comparison.outcomes import Outcome

LATER = ("gate_", "nsconv_over", "detach_shortcut")  # of [model]: what the first weights do not follow from
DENSE = ("fedavg", "fedprox", "fednova", "scaffold")  # methods without masks, the best reference first
NARROWER = {"model.match": None, "model.gate_keep": None, "train.activation_keep": 1.0}  # fields of a dense network


def obstacle(one: Outcome, other: Outcome) -> str | None:
    """Why two runs are no pair; None where they are one."""
    if one.seed != other.seed:
        return "other seed"
    if field := _first_difference(jobs.data(one.job), jobs.data(other.job)):
        return f"other data ({field})"
    if not one.attributes.get("partition_sha256") or not other.attributes.get("partition_sha256"):
        return "a file does not say who holds which images"
    if one.attributes["partition_sha256"] != other.attributes["partition_sha256"]:
        return f"other partition ({_first_difference(_section(one, 'partition'), _section(other, 'partition')) or 'partition_sha256'})"
    images = [run.attributes.get("data_sha256") for run in (one, other)]
    if all(images) and images[0] != images[1]:
        return "other images or labels (data_sha256)"
    if field := _first_difference(_section(one, "cohort"), _section(other, "cohort")):
        return f"other cohorts ({field})"
    common = one.cohorts.keys() & other.cohorts.keys()
    if common and all(one.cohorts[r] != other.cohorts[r] for r in common):
        return "other cohorts (clients/in_cohort)"
    if field := _first_difference(_first_weights(one), _first_weights(other)):
        return f"other first weights ({field})"
    if one.job.get("model.factory") and one.attributes.get("own_code_sha256") != other.attributes.get("own_code_sha256"):
        return "other first weights (own_code_sha256)"
    return None


def _section(run: Outcome, name: str) -> jobs.Job:
    return {field: value for field, value in run.job.items() if field.startswith(f"{name}.")}


def _first_weights(run: Outcome) -> jobs.Job:
    return {field: value for field, value in _section(run, "model").items() if not field.partition(".")[2].startswith(LATER)}


def _first_difference(one: jobs.Job, other: jobs.Job) -> str | None:
    return next((jobs.plain(name) for name in sorted({*one, *other}) if one.get(name) != other.get(name)), None)


def matched(group: Group, baseline: Group) -> tuple[list[tuple[Outcome, Outcome]], str]:
    """Pairs by rising seed, and why there are no more; "" where each run of the group has its pair."""
    references = {run.seed: run for run in baseline.runs}
    found, why = [], dict[str, None]()
    for run in group.runs:
        if run.seed not in references:
            why["other seed"] = None
        elif reason := obstacle(run, references[run.seed]):
            why[reason] = None
        else:
            found.append((run, references[run.seed]))
    return found, "; ".join(why)


def baselines(block: Sequence[Group], meant: Sequence[Group] = ()) -> list[Group]:
    """The group that each group of one block is held against, in the order of the groups.

    meant: those that somebody `wanted` as baselines. Without them the dense method if there is one, else the first row. Where they are
    several, as in a sweep of another field, each group has the one whose job is most like its own; where they are all, it is the first.
    """
    meant = list(meant) or _dense(block) or list(block[:1])
    meant = meant[:1] if len(meant) == len(block) else meant
    return [group if group in meant else max(meant, key=lambda other: _alike(group, other)) for group in block]


def _dense(groups: Sequence[Group]) -> list[Group]:
    for name in DENSE:
        found = [group for group in groups if group.job.get(jobs.METHOD) == name and _is_whole(group)]
        if found:
            return found
    return []


def _is_whole(group: Group) -> bool:
    return all(group.job.get(field) in (None, value) for field, value in NARROWER.items())


def wanted(groups: Sequence[Group], shown: Sequence[str], text: str) -> list[Group]:
    """The groups that `text` means: a row's label, a method, "FIELD=VALUE", or several of these two with commas between.

    ValueError, with all rows, where it means none.
    """
    if found := [group for group in groups if group.label == text]:
        return found
    called = {title: name for name, title in jobs.titles(shown).items()} | {name: name for name in shown}
    asked = {}
    for part in text.split(","):
        field, equals, value = part.strip().partition("=")
        name = called.get(field.strip(), field.strip()) if equals else jobs.METHOD
        asked[name] = (value if equals else field).strip()
    found = [group for group in groups if all(jobs.plain(group.job.get(name)) == value for name, value in asked.items())]
    if not found:
        there = "; ".join(group.label for group in groups)
        raise ValueError(f"--baseline {text}: no row is this; give a method or FIELD=VALUE, such as density=0.1. The rows are: {there}")
    return found


def _alike(one: Group, other: Group) -> int:
    """How many fields outside of [method] two jobs share."""
    names = {name for name in one.job if not name.startswith("method.")}
    return sum(one.job[name] == other.job.get(name) for name in names)
