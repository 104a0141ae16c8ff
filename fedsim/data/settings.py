"""The data room: which images there are (sources), and which client holds which (partition, population).

`DataSettings` is the job's [data] section. This module imports no torch, so that a job is checked before anything heavy loads.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.core import entry_points
from fedsim.errors import BadInput

DRAWN = ("shapes", "fake")  # made here, in any number and size
AUGMENTS: dict[str, tuple[str, ...]] = {  # every data set, with what is usual in training on it
    "digits": (),
    "shapes": (),
    "fake": (),
    "cifar10": ("crop", "flip"),
    "cifar100": ("crop", "flip"),
    "svhn": ("crop",),
    "fashion_mnist": (),
    "emnist": (),
    "cinic10": ("crop", "flip"),
    "tiny_imagenet": ("crop", "flip"),
    "file": (),
}
EMNIST_SPLITS = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")
BORDERS = ("zeros", "reflect")
LAYOUTS = ("nchw", "nhwc")
KINDS = ("crop", "flip", "cutout")  # of augmentation


@dataclass(frozen=True)
class DataSettings:
    """The section [data]: which images there are. A field without a value is as usual for the data set."""

    name: str = "digits"  # a data set: see the README, or what `fedsim data` lists; file: images of your own
    root: str = "data"  # folder of the data sets that are files
    download: bool = False  # whether what is missing in root is fetched from the network
    image_size: int | None = None  # pixels, height = width: digits (upsampled from 8), shapes, fake
    channels: int | None = None  # of images that are made: shapes (1 or 3), fake
    classes: int | None = None  # of images that are made: shapes, fake
    train_images: int | None = None  # how many shapes or fake images are made; of other sets so many, each class in proportion
    test_images: int | None = None  # the same of test images
    augment: tuple[str, ...] | None = None  # some of crop, flip, cutout; without it as usual for the data set
    crop_pad: int = 4  # pixels of padding that a crop moves in
    crop_border: str = "zeros"  # what it is padded with: zeros | reflect
    normalise: bool = True  # by the training images' mean and deviation; false: pixels in [0, 1]
    cutout: int = 16  # pixels, side of the square cut out
    split: str = "balanced"  # emnist: which of its parts
    path: str | None = None  # file: the user's HDF5 or npz file
    factory: str | None = None  # "package.module:function" of your own, in place of name: it returns the arrays that a file would hold
    layout: str | None = None  # file, factory: the axes of the images: nchw | nhwc; None: recognised by the shape
    relabel: bool = False  # file, factory: number the labels that occur, in sorted order, from 0

    def __post_init__(self) -> None:
        if self.factory is not None and not all(self.factory.partition(":")):
            raise BadInput(f'data.factory = "{self.factory}" should be "package.module:function"')
        if self.name not in AUGMENTS and entry_points.find(entry_points.DATASETS, self.name, "[data] name") is None:
            raise entry_points.unknown("[data] name", self.name, [*AUGMENTS, *entry_points.names(entry_points.DATASETS)])
        _one_of("split", self.split, EMNIST_SPLITS)
        for kind in self.augment or ():
            _one_of("augment", kind, KINDS)
        _one_of("crop_border", self.crop_border, BORDERS)
        if self.layout is not None:
            _one_of("layout", self.layout, LAYOUTS)
        self._check_applies()
        self._check_numbers()

    @property
    def called(self) -> str:
        """What messages call the images."""
        return self.factory or self.name

    def augments(self) -> tuple[str, ...]:
        """The augmentations in use: those named, or else the data set's usual ones."""
        usual = () if self.factory is not None else AUGMENTS.get(self.name, ())
        return usual if self.augment is None else tuple(self.augment)

    def _check_applies(self) -> None:
        if self.factory is not None:
            self._check_factory()
            return
        if self.name not in AUGMENTS:
            return  # an installed package offers it, and decides which fields it takes
        for name in ("channels", "classes"):
            if getattr(self, name) is not None and self.name not in DRAWN:
                raise BadInput(f"[data] {name} applies to {' and '.join(DRAWN)}; {self.name} has its own; leave {name} out")
        if self.image_size is not None and self.name not in ("digits", *DRAWN):
            raise BadInput(f"[data] image_size applies to digits, {' and '.join(DRAWN)}; {self.name} has its own; leave it out")
        if self.name == "file" and not self.path:
            raise BadInput('[data] name = "file" needs path, your HDF5 or npz file, for example path = "mine.h5"')
        for name in ("path", "layout", "relabel"):
            if getattr(self, name) not in (None, False) and self.name != "file":
                more = "" if name == "path" else " and to a data.factory"
                raise BadInput(f'[data] {name} applies to name = "file"{more}; leave it out for {self.name}')
        if self.split != "balanced" and self.name != "emnist":
            raise BadInput(f"[data] split applies to emnist; {self.name} has no splits, leave split out")

    def _check_factory(self) -> None:
        for name in ("channels", "classes", "image_size", "path"):
            if getattr(self, name) is not None:
                raise BadInput(f"[data] {name} does not apply to data.factory, which makes its images itself; leave it out")

    def _check_numbers(self) -> None:
        least = {
            "image_size": 8 if self.name in ("digits", "shapes") else 1,
            "channels": 1,
            "classes": 2,
            "train_images": 1,
            "test_images": 1,
        }
        for name, low in (least | {"crop_pad": 0, "cutout": 1}).items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise BadInput(f"[data] {name} = {value} is too small for {self.name}; the least is {low}")


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise entry_points.unknown(f"[data] {field}", value, known)
