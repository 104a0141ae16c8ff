"""Max pooling of 2x2 windows that do not overlap, on contiguous rows of float32; torch's kernel reads one value at a time.

Of equal values the first counts, and one that is not a number is the largest, as in torch.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fedsim.core.compiled import kernel

FLOAT, BYTE, INT = ir.FloatType(), ir.IntType(8), ir.IntType(32)
SIZE = 4  # bytes of a float32


class _Lanes:
    """Instructions on the windows of one strip of two rows."""

    def __init__(self, builder: Any, width: int) -> None:
        self.builder, self.width = builder, width

    def at(self, address: Any, kind: Any, lanes: int) -> Any:
        return self.builder.inttoptr(address, ir.VectorType(kind, lanes).as_pointer())

    def load(self, address: Any, kind: Any = FLOAT, align: int = SIZE) -> Any:
        value = self.builder.load(self.at(address, kind, self.width))
        value.align = align
        return value

    def store(self, value: Any, address: Any, align: int = SIZE) -> None:
        self.builder.store(value, self.at(address, value.type.element, value.type.count)).align = align

    def pair(self, address: Any) -> tuple[Any, Any]:
        """Left and right values of a row's windows."""
        value = self.builder.load(self.at(address, FLOAT, 2 * self.width))
        value.align = SIZE
        return self._shuffled(value, value, range(0, 2 * self.width, 2)), self._shuffled(value, value, range(1, 2 * self.width, 2))

    def joined(self, left: Any, right: Any) -> Any:
        """The inverse of `pair`."""
        return self._shuffled(left, right, [side * self.width + k for k in range(self.width) for side in (0, 1)])

    def _shuffled(self, a: Any, b: Any, order: Any) -> Any:
        lanes = ir.Constant(ir.VectorType(INT, len(order)), [INT(k) for k in order])
        return self.builder.shuffle_vector(a, b, lanes)

    def all(self, value: Any, kind: Any) -> Any:
        return ir.Constant(ir.VectorType(kind, self.width), [kind(value)] * self.width)

    def larger(self, a: Any, b: Any, place_a: Any, place_b: Any) -> tuple[Any, Any]:
        """b and its place where it is larger or not a number, else a and its place."""
        taken = self.builder.or_(self.builder.fcmp_ordered(">", b, a), self.builder.fcmp_unordered("uno", b, b))
        return self.builder.select(taken, b, a), self.builder.select(taken, place_b, place_a)


def _largest(width: int) -> Any:
    """Addresses of two rows, of the values that come out and of their places: 0 to 3 in the window, a byte each."""

    @intrinsic
    def largest(context: Any, top: Any, bottom: Any, out: Any, place: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            top, bottom, out, place = given
            lanes = _Lanes(builder, width)
            first, second, third, fourth = (lanes.all(k, BYTE) for k in range(4))
            above, below = lanes.larger(*lanes.pair(top), first, second), lanes.larger(*lanes.pair(bottom), third, fourth)
            value, where = lanes.larger(above[0], below[0], above[1], below[1])
            lanes.store(value, out)
            lanes.store(where, place, 1)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), code

    return largest


def _placed(width: int) -> Any:
    """Addresses of gradients and places, and of two rows that hold each gradient at its place and 0 elsewhere."""

    @intrinsic
    def placed(context: Any, g: Any, place: Any, top: Any, bottom: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            g, place, top, bottom = given
            lanes = _Lanes(builder, width)
            value, where, zero = lanes.load(g), lanes.load(place, BYTE, 1), lanes.all(0.0, FLOAT)
            each = [builder.select(builder.icmp_unsigned("==", where, lanes.all(k, BYTE)), value, zero) for k in range(4)]
            lanes.store(lanes.joined(*each[:2]), top)
            lanes.store(lanes.joined(*each[2:]), bottom)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), code

    return placed


_LARGEST8, _LARGEST4, _LARGEST2, _LARGEST1 = (_largest(width) for width in (8, 4, 2, 1))
_PLACED8, _PLACED4, _PLACED2, _PLACED1 = (_placed(width) for width in (8, 4, 2, 1))


@kernel
def largest(x: Any, out: Any, place: Any) -> None:  # pragma: no cover - compiled
    """out (P, h, w) and place (P, h, w) uint8 of x (P, H, W), h = H // 2, w = W // 2."""
    planes, height, width = out.shape
    row = SIZE * x.shape[2]
    for p in range(planes):
        for i in range(height):
            done = (p * height + i) * width
            top, value, where = x.ctypes.data + (p * x.shape[1] + 2 * i) * row, out.ctypes.data + SIZE * done, place.ctypes.data + done
            j = 0
            while j < width:
                if width - j >= 8:
                    _LARGEST8(top + 2 * SIZE * j, top + row + 2 * SIZE * j, value + SIZE * j, where + j)
                    j += 8
                elif width - j >= 4:
                    _LARGEST4(top + 2 * SIZE * j, top + row + 2 * SIZE * j, value + SIZE * j, where + j)
                    j += 4
                elif width - j >= 2:
                    _LARGEST2(top + 2 * SIZE * j, top + row + 2 * SIZE * j, value + SIZE * j, where + j)
                    j += 2
                else:
                    _LARGEST1(top + 2 * SIZE * j, top + row + 2 * SIZE * j, value + SIZE * j, where + j)
                    j += 1


@kernel
def placed(g: Any, place: Any, into: Any) -> None:  # pragma: no cover - compiled
    """into (P, H, W), all of it written where H and W are even: g (P, h, w) at its places, 0 elsewhere."""
    planes, height, width = g.shape
    row = SIZE * into.shape[2]
    for p in range(planes):
        for i in range(height):
            done = (p * height + i) * width
            top, value, where = into.ctypes.data + (p * into.shape[1] + 2 * i) * row, g.ctypes.data + SIZE * done, place.ctypes.data + done
            j = 0
            while j < width:
                if width - j >= 8:
                    _PLACED8(value + SIZE * j, where + j, top + 2 * SIZE * j, top + row + 2 * SIZE * j)
                    j += 8
                elif width - j >= 4:
                    _PLACED4(value + SIZE * j, where + j, top + 2 * SIZE * j, top + row + 2 * SIZE * j)
                    j += 4
                elif width - j >= 2:
                    _PLACED2(value + SIZE * j, where + j, top + 2 * SIZE * j, top + row + 2 * SIZE * j)
                    j += 2
                else:
                    _PLACED1(value + SIZE * j, where + j, top + 2 * SIZE * j, top + row + 2 * SIZE * j)
                    j += 1
