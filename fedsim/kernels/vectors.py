"""Vector instructions that kernels are written in where the order of a sum matters: lanes and order are said, the compiler chooses nothing.

A product and a sum in one rounding is always `llvm.fma`, on every processor, and never the compiler's choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

FLOAT, LONG, INT = ir.FloatType(), ir.IntType(64), ir.IntType(32)
SIZE = 4  # bytes of a float32, and of an offset
HAS_512 = "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2]  # of the processor that kernels are compiled for


class Strip:
    """Instructions on a strip of vectors at an address."""

    def __init__(self, builder: Any, vectors: int, width: int) -> None:
        self.builder, self.vectors, self.width = builder, vectors, width
        self.kind = ir.VectorType(FLOAT, width)
        self.zero = ir.Constant(self.kind, [FLOAT(0.0)] * width)

    def pointer(self, address: Any, kind: Any = FLOAT) -> Any:
        return self.builder.inttoptr(address, kind.as_pointer())

    def item(self, pointer: Any, index: Any) -> Any:
        return self.builder.load(self.builder.gep(pointer, [index]))

    def splat(self, value: Any) -> Any:
        kind = ir.VectorType(value.type, self.width)
        alone = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, INT(0))
        return self.builder.shuffle_vector(alone, ir.Constant(kind, ir.Undefined), _lanes([0] * self.width))

    def place(self, pointer: Any, k: int) -> Any:
        return self.builder.bitcast(self.builder.gep(pointer, [LONG(k * self.width)]), self.kind.as_pointer())

    def load(self, pointer: Any, k: int) -> Any:
        value = self.builder.load(self.place(pointer, k))
        value.align = SIZE
        return value

    def store(self, value: Any, pointer: Any, k: int) -> None:
        self.builder.store(value, self.place(pointer, k)).align = SIZE

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return fma(self.builder, a, b, c, f"v{self.width}f32")

    def within(self, left: Any, k: int) -> Any:
        """Which values of vector k are among the first `left` of the strip."""
        numbers = _lanes(range(k * self.width, (k + 1) * self.width))
        return self.builder.icmp_signed("<", numbers, self.splat(self.builder.trunc(left, INT)))

    def copied(self, pointer: Any, left: Any) -> Any:
        """A strip that begins with the first `left` values; the others are not read."""
        copy = cgutils.alloca_once(self.builder, FLOAT, self.vectors * self.width)
        with cgutils.for_range(self.builder, left) as loop:
            self.builder.store(self.item(pointer, loop.index), self.builder.gep(copy, [loop.index]))
        return copy

    def joined(self, vectors: list[Any]) -> Any:
        """One vector: the first half of the vectors plus the second, until one is left."""
        while len(vectors) > 1:
            half = len(vectors) // 2
            vectors = [self.builder.fadd(vectors[k], vectors[half + k]) for k in range(half)]
        return vectors[0]

    def added_up(self, vector: Any) -> Any:
        """The lower half plus the upper half, until one value is left."""
        width = vector.type.count if isinstance(vector.type, ir.VectorType) else 1
        while width > 1:
            width //= 2
            halves = [self.builder.shuffle_vector(vector, vector, _lanes(range(at, at + width))) for at in (0, width)]
            vector = self.builder.fadd(*halves)
        return self.builder.extract_element(vector, INT(0))

    def sums(self, start: Any) -> list[Any]:
        """Registers, one a vector."""
        held = [cgutils.alloca_once(self.builder, self.kind) for _ in range(self.vectors)]
        for one in held:
            self.builder.store(start, one)
        return held


def _lanes(numbers: Iterable[int]) -> Any:
    held = [INT(number) for number in numbers]
    return ir.Constant(ir.VectorType(INT, len(held)), held)


def fma(builder: Any, a: Any, b: Any, c: Any, kind: str) -> Any:
    """a · b + c, rounded once."""
    call = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), f"llvm.fma.{kind}")
    return builder.call(call, [a, b, c])


def _multiply_add(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once, of three float32 or three float64."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return fma(builder, given[0], given[1], given[2], f"f{a.bitwidth}")

    return (a(a, a, a), code) if a == b == c and isinstance(a, types.Float) else None


multiply_add: Any = intrinsic(_multiply_add)
