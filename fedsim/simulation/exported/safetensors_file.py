"""The `state_dict` of a network as a safetensors file: tensors by name, and no code.

Entries that are one tensor (tied weights) stand there once, as `safetensors.torch.save_model` writes them: the metadata says
which key an absent one is equal to, and `safetensors.torch.load_model` fills both.
"""

from __future__ import annotations

import copy
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedsim.core.tree import sha256_of
from fedsim.errors import BadInput
from fedsim.simulation.exported.form import Facts, Form, Network


def _content(module: nn.Module, images: Tensor, facts: Facts) -> bytes:
    ties = _ties(module)
    held = {name: value.detach().clone().contiguous() for name, value in module.state_dict().items() if name not in ties}
    return save(held, facts | ties)


def _ties(module: nn.Module) -> dict[str, str]:
    """Key -> the earlier key of the same tensor."""
    first: dict[tuple[object, ...], str] = {}
    found = {}
    for name, value in module.state_dict().items():
        same = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (name,)
        if first.setdefault(same, name) != name:
            found[name] = first[same]
    return found


def _read(path: Path, content: bytes, module: nn.Module) -> Network:
    """The module with the values of the file; BadInput where they are not its own, bit for bit."""
    twin = copy.deepcopy(module)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    found = load_file(path)
    twin.load_state_dict({name: found[name if name in found else facts[name]] for name in module.state_dict()})
    if sha256_of(twin.state_dict()) != sha256_of(module.state_dict()):
        raise BadInput("the tensors in the file are not those of the module")
    return twin


def _how(out: Path, module: nn.Module, why: str) -> str:
    load = f'safetensors.torch.load_file("{out}")'
    if ties := _ties(module):
        name, same = next(iter(ties.items()))
        return f'safetensors.torch.load_model(module, "{out}"), which also fills {name}, the same tensor as {same}'
    return f"{load} is the state_dict of the module that --to torch writes, and fedsim.export_module gives"


FORM = Form(".safetensors", _content, _read, _how)
