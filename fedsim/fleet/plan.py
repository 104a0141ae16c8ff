"""The execution plan: how clients are carried out, as plain numbers. Every plan computes the same sums, each in bits of its own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace

import torch

from fedsim.errors import BadInput
from fedsim.fleet.messages import WorkerContext
from fedsim.kernels.sparse.cost_model import CostRow, from_rows
from fedsim.nn.mixed_precision import settle

STACKED = ("packed", "cuda_graph")  # fleets that train the clients of a pack at once


@dataclass(frozen=True)
class Plan:
    """How clients are carried out."""

    fleet: str = "serial"  # serial | packed | cuda_graph
    packs: int = 16  # that a cohort is cut into
    channels_last: bool = False
    device: str = "cpu"  # kind
    dtype: str = "float32"  # of convolutions and products
    packed_conv: str = "grouped"  # convolutions of a pack: grouped | matmul
    sparse: tuple[CostRow, ...] = ()  # the cost of every layer, which decides from what density on it runs sparse kernels; empty: never
    torch: str = str(torch.__version__)

    def pack(self, cohort: int) -> int:
        """Clients that are trained at once."""
        return -(-cohort // self.packs) if self.fleet in STACKED else 1

    def apply(self, context: WorkerContext) -> WorkerContext:
        """The context under this plan. It sets the kernels of the context's net, in place."""
        settle(context.net, self.dtype, context.device, self.packed_conv)
        context.net.set_sparse_costs(from_rows(self.sparse))
        return replace(context, channels_last=self.channels_last)

    def describe(self) -> str:
        """One line for people: the fleet, the packs, and what differs from the reference."""
        return ", ".join([self.fleet, f"{self.packs} packs", *self.ways])

    @property
    def ways(self) -> list[str]:
        """What differs from the reference, besides the fleet."""
        ways = {
            "channels last": self.channels_last,
            "sparse kernels": bool(self.sparse),
            "matmul convolutions": self.packed_conv == "matmul",
        }
        return [name for name, taken in (ways | {self.dtype: self.dtype != "float32"}).items() if taken]

    def text(self) -> str:
        """The plan as JSON: for the run file, and for the other ranks."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of(cls, text: str) -> Plan:
        """The inverse of `text`; BadInput where it is no plan, or one with fields of a later version."""
        try:
            values = json.loads(text)
            unknown = sorted(values.keys() - {field.name for field in fields(cls)})
            if unknown:
                raise ValueError(f"it has the field {unknown[0]!r} of a later version")
            if type(packs := values.get("packs")) is float and packs.is_integer():  # as plans of the CUDA graph fleet once had them
                values["packs"] = int(packs)
            found = cls(**values | {"sparse": tuple(tuple(row) for row in values.get("sparse", ()))})
            if type(found.packs) is not int or found.packs < 1 or type(found.fleet) is not str:
                raise ValueError(f"its fleet is {found.fleet!r:.40}, its packs are {found.packs!r:.40}")
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise BadInput(f"this is no plan that this fedsim reads ({error}): {str(text)[:60]!r}") from error
        return found
