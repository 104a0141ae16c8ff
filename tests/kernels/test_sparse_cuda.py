"""The Triton twin of the sparse kernels: against dense layers in float64 by Triton's interpreter, which needs no GPU, and on one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.kernels.sparse import layers
from fedsim.kernels.sparse.chwn_layout import is_chwn
from fedsim.kernels.sparse.pattern import Geometry, Pattern

CASES = {  # (O, I / groups, kernel), (B, I, H, W), (stride, padding, dilation, groups), density
    "padded": ((2, 2, 3, 3), (4, 2, 3, 4), (1, 1, 1, 1), 0.25),
    "ragged": ((2, 2, 3, 3), (7, 2, 2, 3), (1, 1, 1, 1), 0.3),
    "unpadded": ((2, 2, 3, 3), (3, 2, 5, 4), (1, 0, 1, 1), 0.3),
    "strided": ((2, 2, 3, 3), (2, 2, 4, 5), (2, 1, 1, 1), 0.4),
    "by three": ((2, 2, 2, 2), (2, 2, 7, 8), (3, 2, 2, 1), 0.5),
    "dilated": ((2, 2, 3, 3), (2, 2, 3, 4), (1, 2, 2, 1), 0.3),
    "depthwise": ((4, 1, 3, 3), (3, 4, 4, 4), (2, 1, 1, 4), 0.4),
    "grouped": ((4, 2, 1, 1), (4, 4, 3, 3), (1, 0, 1, 2), 0.5),
    "pointwise": ((5, 4, 1, 1), (3, 4, 4, 4), (1, 0, 1, 1), 0.4),
    "pointwise, strided": ((3, 3, 1, 1), (2, 3, 5, 5), (2, 0, 1, 1), 0.5),
    "many strips": ((2, 1, 1, 1), (10, 1, 16, 9), (1, 0, 1, 1), 1.0),
    "linear": ((6, 5, 1, 1), (20, 5, 1, 1), (1, 0, 1, 1), 0.4),
    "one image": ((3, 2, 1, 1), (1, 2, 1, 1), (1, 0, 1, 1), 0.5),
    "all kept": ((2, 1, 2, 2), (2, 1, 3, 3), (1, 0, 1, 1), 1.0),
    "none kept": ((2, 2, 3, 3), (2, 2, 4, 4), (1, 1, 1, 1), 0.0),
}
PARTS = "out", "by images", "by values", "by bias"
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def drawn(name: str) -> tuple[Tensor, Tensor, Tensor, Pattern]:
    """Images, weight, bias, and a pattern of as many kept positions as the density says."""
    shape, size, (stride, padding, dilation, groups), density = CASES[name]
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(len(name)))
    kept = draw(prod(shape)).argsort() < round(density * prod(shape))
    way = Geometry((stride, stride), (padding, padding), (dilation, dilation), groups)
    return draw(size), draw(shape), draw(shape[0]), Pattern(kept.view(shape), way)


def dense(x: Tensor, weight: Tensor, bias: Tensor, pattern: Pattern) -> tuple[Tensor, ...]:
    """Output and gradients of the masked layer, in float64, for the loss that is half the sum of squares."""
    way = pattern.geometry
    x, w, b = (part.double().requires_grad_() for part in (x, weight * pattern.mask, bias))
    out = F.conv2d(x, w, b, way.stride, way.padding, way.dilation, way.groups)
    by_x, by_w, by_b = torch.autograd.grad(out, (x, w, b), out.detach())
    return out.detach(), by_x, pattern.values(by_w), by_b


def away(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value, or over 1, the size of what is drawn; infinite for another shape."""
    if found.shape != wanted.shape:
        return float("inf")
    return float((found.detach().double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)) if wanted.numel() else 0.0


def interpreted(name: str) -> dict[str, float]:
    from fedsim.kernels.sparse import cuda

    x, weight, bias, pattern = drawn(name)
    wanted = dense(x, weight, bias, pattern)
    images, values = x.movedim(0, -1).contiguous(), pattern.values(weight)
    out = cuda.forward(images, values, bias, pattern)
    by_images, by_values = cuda.backward(images, values, wanted[0].float().movedim(0, -1).contiguous(), pattern)
    parts = out, by_images.movedim(-1, 0), by_values
    return {part: away(found, want) for part, found, want in zip(PARTS, parts, wanted, strict=False)}


def selected(dtype: torch.dtype) -> bool:
    """Whether the interpreter's largest entries are those of the CPU's kernels, to the bit."""
    from fedsim.kernels.activation_pruning import topk, topk_cuda

    whole = True
    for entries, share in ((5000, 0.3), (2048, 0.01), (17, 0.6), (4100, 1.0)):
        draw = torch.randn(2, entries, generator=torch.Generator().manual_seed(entries))
        x = (draw.relu() * 8).round().div(8).to(dtype) if share < 0.5 else draw.to(dtype)  # many are equal
        k = max(1, int(share * entries))
        kept, kind = torch.tensor([k, max(1, k // 2)]), topk.INTEGERS[dtype]
        bits, values = topk.select(x, kept, k)
        held = torch.zeros_like(values).view(kind)
        found, _ = topk_cuda.select(x.view(kind), kept, held, topk._magnitude(dtype))
        whole &= torch.equal(found, bits) and torch.equal(held.view(dtype), values)
        back = topk_cuda.restore(bits, values.view(kind), entries).view(dtype)
        whole &= torch.equal(back, topk.restore(bits, values, entries))
    return whole


def main() -> None:
    """What the interpreter gives; it must be asked for before Triton is imported, so in a process of its own."""
    x, weight, bias, pattern = drawn("padded")
    layers.conv2d(x, pattern.values(weight), bias, pattern)
    answer: dict[str, object] = {"imported": "triton" in sys.modules}
    answer |= {name: interpreted(name) for name in CASES}
    answer["largest"] = {str(dtype): selected(dtype) for dtype in (torch.float32, torch.bfloat16)}
    from fedsim.kernels.sparse import cuda

    cuda.PROGRAMS = 4  # so few that every program takes several strips
    answer["shared"] = interpreted("padded")
    print(json.dumps(answer))


@pytest.fixture(scope="module")
def answer() -> dict[str, dict[str, float]]:
    root = Path(__file__).parents[2]
    given = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))}
    run = subprocess.run([sys.executable, __file__], env=given, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@TRITON
@pytest.mark.parametrize("name", [*CASES, "shared"])
@pytest.mark.processes
def test_the_twin_is_the_dense_layer(answer, name) -> None:
    assert len(answer[name]) == 3
    assert all(far < 1e-5 for far in answer[name].values()), answer[name]


@TRITON
@pytest.mark.processes
def test_the_largest_entries_are_the_cpus_to_the_bit(answer) -> None:
    assert answer["largest"] == {"torch.float32": True, "torch.bfloat16": True}


@TRITON
def test_the_largest_entries_compile_for_a_gpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fedsim.kernels.activation_pruning import topk_cuda

    fixed = {"SHIFT": 21, "WIDTH": 10, "FIRST": True, "MAGNITUDE": 31, "BLOCK": topk_cuda.BLOCK}
    kinds = dict.fromkeys(("x", "least", "table", "above", "equal", "values", "out", "kept"), "*i32") | {"bits": "*u8"}
    kinds |= dict.fromkeys(("ties", "before", "offsets"), "*i64")
    for kernel in (topk_cuda._count, topk_cuda._tally, topk_cuda._write, topk_cuda._weigh, topk_cuda._restore):
        mine = {name: fixed[name] for name in kernel.arg_names if name in fixed}
        signature = {name: "constexpr" if name in mine else kinds.get(name, "i32") for name in kernel.arg_names}
        assert triton.compile(ASTSource(kernel, signature, mine), target=GPUTarget("cuda", 90, 32)).asm["ptx"]


@TRITON
@pytest.mark.processes
def test_without_cuda_triton_stays_unimported(answer) -> None:
    assert answer["imported"] is False


@TRITON
def test_compiled_for_a_gpu_one_load_takes_four_images(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fedsim.kernels.sparse import cuda

    kinds = dict.fromkeys(("x", "g", "values", "bias", "out", "found"), "*fp32") | {"offsets": "*i32", "owners": "*i32", "begins": "*i64"}
    for kernel in (cuda._gather, cuda._dots):
        ways, *_ = cuda._ways(cuda.Rows(0, 1, 768, 768), 12)
        fixed = {name: ways.pop(name) for name in ("EVEN", "BLOCK")}
        signature = {name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in kernel.arg_names}
        aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names) if name in kinds}
        source = ASTSource(kernel, signature, fixed, aligned)
        text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=ways).asm["ptx"]
        assert "ld.global.v4" in text
        assert "fma.rn.f32" in text
        assert "atom" not in text  # the order of atomics is not that of the last run


@CUDA
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_the_layer_is_the_dense_one_and_its_bits_are_those_of_the_last_run(name) -> None:
    given = drawn(name)
    wanted = [part.cuda() for part in dense(*given)]
    runs = [on_gpu(*given) for _ in range(2)]
    assert is_chwn(runs[0][0]) or given[0].shape[0] == 1
    for part, want, first, second in zip(PARTS, wanted, *runs, strict=True):
        assert away(first, want) < 1e-5, part
        assert torch.equal(first, second), part


def on_gpu(x: Tensor, weight: Tensor, bias: Tensor, pattern: Pattern) -> tuple[Tensor, ...]:
    """What `dense` gives, by the layer itself, on CUDA."""
    there = Pattern(pattern.mask.cuda(), pattern.geometry)
    x, values, b = (part.cuda().requires_grad_() for part in (x, there.values(weight.cuda()), bias))
    out = layers.conv2d(x, values, b, there)
    return out, *torch.autograd.grad(out, (x, values, b), out.detach())


if __name__ == "__main__":
    main()
