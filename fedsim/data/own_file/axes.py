"""The order of the axes of a user's images: (n, C, H, W) as torch has it, (n, H, W, C) as image files have it, or (n, H, W)."""

from __future__ import annotations

from fedsim.errors import BadInput

Shape = tuple[int, ...]
FEW = 4  # channels at most of what is plainly an image: grey, grey with alpha, colours, colours with alpha
ORDERS = {"nchw": (0, 1, 2, 3), "nhwc": (0, 3, 1, 2)}
SPELT = {"nchw": "(n, C, H, W)", "nhwc": "(n, H, W, C)"}


def order_of(where: str, name: str, shape: Shape, layout: str | None) -> tuple[str, str]:
    """ "nhw", "nchw" or "nhwc", and a note where it was recognised; BadInput for another shape, or one that can be read in two ways."""
    if len(shape) == 3:
        if layout is not None:
            raise BadInput(f"{where}: {name} is {shape}, grey images (n, H, W) without an axis of channels; leave out data.layout")
        return "nhw", ""
    if len(shape) != 4:
        right = "it must be (n, C, H, W), (n, H, W, C) or, of grey images, (n, H, W)"
        raise BadInput(f"{where}: {name} is {shape}; {right}{_rows(name, shape)}")
    if layout is not None:
        return layout, ""
    likely = {order: _likelihood(shape, order) for order in ORDERS}
    if likely["nchw"] == likely["nhwc"] and shape[1:] != (1, 1, 1):
        both = " or as ".join(f'{_read(shape, order)} (data.layout = "{order}")' for order in ORDERS)
        raise BadInput(f"{where}: {name} is {shape}, which can be read as {both}; set data.layout")
    if likely["nhwc"] > likely["nchw"]:
        return "nhwc", f"{name} is {shape}, read as {_read(shape, 'nhwc')}"
    return "nchw", ""


def _likelihood(shape: Shape, order: str) -> int:
    """Images have few channels and are often square."""
    channels, height, width = (shape[axis] for axis in ORDERS[order][1:])
    return int(channels <= FEW) + int(height == width)


def _read(shape: Shape, order: str) -> str:
    channels, height, width = (shape[axis] for axis in ORDERS[order][1:])
    return f"{SPELT[order]}: {height}x{width} pixels with {channels} channel{'s' if channels != 1 else ''}"


def _rows(name: str, shape: Shape) -> str:
    """How images written as rows of pixels become images."""
    if len(shape) != 2:
        return ""
    side = round(shape[1] ** 0.5)
    size = f"{side}, {side}" if side * side == shape[1] else "H, W"
    return f"; images that are rows of pixels: {name}.reshape({shape[0]}, {size})"
