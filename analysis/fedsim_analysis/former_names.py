"""Names of format 1, and what they are called since format 2: old run files are read under the new names.

fedsim takes these tables from here: this package imports nothing of fedsim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = {  # "group/old" -> new
    "rounds/adjusted": "weights_swapped",
    "rounds/block": "adjusted_block",
    "rounds/candidate": "chosen_candidate",
    "rounds/low_before": "marked_norm_before",
    "rounds/low_after": "marked_norm_after",
    "rounds/client_worst": "worst_client",
    "rounds/root_bytes": "rank0_bytes",
    "rounds/root_messages": "rank0_messages",
    "clients/took_part": "in_cohort",
}
GROUPS = {"clients_masks": "client_gates"}
SECTIONS: dict[str, dict[str, str]] = {  # of a job: section -> old field -> new
    "data": {"size": "image_size", "train": "train_images", "test": "test_images"},
    "partition": {"least": "min_images", "tries": "max_tries"},
    "train": {"nova": "fednova_weights", "mu": "fedprox_mu"},
    "execution": {
        "pack": "packs",
        "layout": "memory_format",
        "stacked": "packed_conv",
        "memory_share": "gpu_memory_fraction",
        "cuda_mpi": "cuda_aware_mpi",
    },
}
METHODS: dict[str, dict[str, str]] = {  # of [method], by the method's name
    "fedtiny": {"stop": "stop_round", "alpha": "adjust_fraction"},
    "fedmef": {
        "stop": "stop_round",
        "swap": "adjust_fraction",
        "transfer": "extrusion_rounds",
        "remark": "remark_every_step",
        "drop": "drop_rule",
    },
    "dwfnp": {
        "keep": "flops_share",
        "keep_client": "client_flops_share",
        "report": "checkpoint_choice",
        "unseen": "unseen_clients",
        "freeze": "freeze_weights",
        "reg": "regulariser",
    },
    "structured": {"keep": "flops_share"},
    "feddp": {"fall": "lr_decay_per_epoch"},
}
FLEETS = {"graphed": "cuda_graph"}


def fields_of(section: str, method: str = "") -> Mapping[str, str]:
    """Old field -> new, of a section of the job; of [method] for the method named."""
    return METHODS.get(method, {}) if section == "method" else SECTIONS.get(section, {})


def job(table: dict[str, Any]) -> dict[str, Any]:
    """A resolved job of format 1 under the names of format 2."""
    method = str(table.get("method", {}).get("name", ""))
    for section, values in table.items():
        if isinstance(values, dict):
            table[section] = renamed(values, fields_of(section, method))
    if isinstance(fleet := table.get("execution", {}).get("fleet"), str):
        table["execution"]["fleet"] = FLEETS.get(fleet, fleet)
    return table


def renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}
