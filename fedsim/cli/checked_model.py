"""The MODEL of `fedsim check` on the command line; all that is wrong with it is reported before anything heavy is imported."""

from __future__ import annotations

from fedsim.errors import BadInput

MODEL = (
    "A job file; or a function that makes the model, as package.module:function or file.py:function. It is called as"
    " function(shape=(C, H, W), classes=N) and gives a torch.nn.Module."
)
SHAPE = "Shape of an image, where MODEL is a function. Default: 3,32,32."
CLASSES = "Number of classes, where MODEL is a function. Default: 10."


def sizes_of(place: str, shape: str, settings: list[str] | None) -> tuple[int, int, int]:
    """The --shape of images for a function; BadInput where it, or the place of the function, is written wrongly."""
    where, _, name = place.rpartition(":")
    if not where or not name:
        raise BadInput(f"fedsim check {place}: a function is written as package.module:function, or as file.py:function")
    if settings:
        raise BadInput(f"--set {settings[0]}: it replaces a value of a job file, and {place} is a function")
    sizes = [int(size) if size.strip().isdecimal() else 0 for size in shape.split(",")]
    if len(sizes) != 3 or not all(sizes):
        raise BadInput(f"--shape {shape}: should be C,H,W, for example 3,32,32")
    return sizes[0], sizes[1], sizes[2]


def refuse_for_jobs(model: str, shape: str | None, classes: int | None) -> None:
    """BadInput for what belongs to a function, where the MODEL is a job file."""
    if model.endswith(".py"):
        raise BadInput(f"fedsim check {model}: which function makes the model? Write {model}:function")
    if shape is not None or classes is not None:
        option = "--classes" if shape is None else "--shape"
        raise BadInput(f"{option} is for a function; the images of {model} follow from its section [data]")
