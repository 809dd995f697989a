"""Images to train on: scikit-learn's digits, a folder of class folders, or random numbers.

Every image is a uint8 tensor [3, S, S]; `to_input` makes the network's input of a batch of them.
The test part of a data set is fixed: it depends neither on the seed nor on the other options.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from fused_inception.tools.errors import UserError, require

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# folders that are parts of a data set, not classes, the first of them that there is
TRAIN_PARTS = ("train", "training")
TEST_PARTS = ("val", "valid", "validation", "test", "testing")
TEST_FRACTION = 0.2
SMALLEST_CROP = 0.7  # of the shorter side, when training on a folder of images
SYNTHETIC_BATCHES = 20
PATIENCE = 2.0  # seconds without a progress bar


class ImageSet(Sized, Protocol):
    """Images with their class numbers."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class Batches:
    """Pairs of uint8 images [N, 3, S, S] and class numbers [N]; how many images, how many pairs."""

    source: Iterable[tuple[Tensor, Tensor]]
    images: int
    steps: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.source)


@dataclass(frozen=True)
class Data:
    """A data set, split into a part to train on and a held-out part to test on.

    Attributes:
        names: a digest of the names of the files in both parts; None where there are none.
    """

    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    names: str | None = None


def open_data(spec: str, image_size: int, *, flip: bool = False) -> Data:
    """The data set named by `--data`: digits or imagefolder:PATH.

    Raises:
        UserError: unknown name, missing or unsuitable folder, an extra that is not installed.
    """
    name, _, path = spec.partition(":")
    if spec == "digits":
        return _digits(image_size)
    if name == "imagefolder" and path:
        return _image_folder(Path(path), image_size, flip)
    raise UserError(f"unknown data set {spec!r}: use digits, imagefolder:PATH or synthetic")


def absolute(spec: str) -> str:
    """`--data` that names the same images from every working directory."""
    name, _, path = spec.partition(":")
    return f"{name}:{Path(path).resolve()}" if path else spec


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [N, 3, S, S] -> float32 from -1 to 1 on `device`, channels last."""
    images = images.to(device, non_blocking=True)
    return images.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1.0)


def train_batches(
    images: ImageSet,
    batch_size: int,
    *,
    seed: int,
    limit: int | None = None,
    workers: int = 0,
    pin: bool = False,
) -> Batches:
    """Shuffled full batches of one epoch, of at most `limit` images; the rest is left out.

    `seed` decides the order and, in worker processes, the crops.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)[:limit].tolist()
    batch_size = min(batch_size, len(order))
    order = order[: len(order) // batch_size * batch_size]
    return _load(images, order, batch_size, workers, pin, generator)


def held_out_batches(
    images: ImageSet,
    batch_size: int,
    *,
    limit: int | None = None,
    workers: int = 0,
    pin: bool = False,
) -> Batches:
    """All images in their order, or `limit` of them, evenly spaced: a folder is sorted by class."""
    count = len(images) if limit is None else min(limit, len(images))
    order = [i * len(images) // count for i in range(count)]
    # a generator of its own: without one the loader draws from the global one
    return _load(images, order, batch_size, workers, pin, torch.Generator())


def check_images(data: Data, batch_size: int, **how: Any) -> None:
    """See that what is read only after an epoch, or at its end, can be read at all.

    Files to test on are decoded as a test would, with the keyword arguments of `held_out_batches`;
    of those to train on, which the first epoch reads, only the headers.

    Raises:
        UserError: the message names the file.
    """
    if not isinstance(data.train, _Files):
        return
    from tqdm import tqdm

    batches = held_out_batches(data.test, batch_size, **how)
    total = len(data.train) + batches.images
    with tqdm(
        total=total, desc="looking at the images", unit="img", leave=False, delay=PATIENCE
    ) as bar:
        for path, _ in data.train.files:
            with _opened(path):
                bar.update()
        for _, labels in batches:
            bar.update(len(labels))


def _load(
    images: ImageSet,
    order: list[int],
    batch_size: int,
    workers: int,
    pin: bool,
    generator: torch.Generator,
) -> Batches:
    loader: DataLoader[Any] = DataLoader(
        images,  # type: ignore[arg-type]  # anything sized that can be indexed will do
        batch_size,
        sampler=order,
        num_workers=workers,
        pin_memory=pin,
        generator=generator,
    )
    return Batches(loader, len(order), len(loader))


def synthetic_batches(
    batch_size: int, image_size: int, classes: int, device: torch.device, limit: int | None
) -> Batches:
    """One random batch that stays on the device, again and again: no loading, no transfer."""
    size = (batch_size, 3, image_size, image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    labels = torch.randint(0, classes, (batch_size,), device=device)
    steps = SYNTHETIC_BATCHES if limit is None else max(1, limit // batch_size)
    return Batches([(images, labels)] * steps, steps * batch_size, steps)


def read_image(path: Path, size: int) -> Tensor:
    """The central square of an image file as uint8 [3, size, size].

    Raises:
        UserError: the file is missing or cannot be read as an image.
    """
    image = _open_image(path)
    return _resized(image, _square(image.size, 1.0, 0.5, 0.5), size)


def _digits(image_size: int) -> Data:
    """1797 handwritten digits of 8x8 pixels, enlarged; a fifth of each class is held out."""
    require("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    grey = torch.from_numpy(raw.images).to(torch.float32)[:, None] * (255 / 16)
    grey = F.interpolate(grey, size=(image_size, image_size), mode="bilinear").round_()
    images, labels = grey.to(torch.uint8), raw.target.tolist()
    train, test = train_test_split(
        range(len(labels)), test_size=TEST_FRACTION, stratify=labels, random_state=0
    )
    train, test = (_Arrays(images[part], [labels[i] for i in part]) for part in (train, test))
    return Data(tuple(str(name) for name in raw.target_names), train, test)


class _Arrays:
    """Grey images in memory."""

    def __init__(self, images: Tensor, labels: Sequence[int]) -> None:
        self.images = images  # [N, 1, S, S]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].expand(3, -1, -1), self.labels[index]


class _Files:
    """Image files, read when asked for; `crop` takes another part of the image each time."""

    def __init__(
        self, files: Sequence[tuple[Path, int]], size: int, *, crop: bool, flip: bool
    ) -> None:
        self.files = files
        self.size = size
        self.crop = crop
        self.flip = flip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        if not self.crop:
            return read_image(path, self.size), label
        image = _open_image(path)
        side, x, y, mirror = torch.rand(4).tolist()
        box = _square(image.size, SMALLEST_CROP + (1 - SMALLEST_CROP) * side, x, y)
        pixels = _resized(image, box, self.size)
        return pixels.flip(2) if self.flip and mirror < 0.5 else pixels, label


def _image_folder(path: Path, size: int, flip: bool) -> Data:
    require("PIL")
    if not path.is_dir():
        raise UserError(f"no folder {path}: --data imagefolder:PATH needs PATH/<class>/<image>")
    parts = _parts(path)
    roots = parts or (path, path)
    if parts is not None:
        train, test = (_class_files(part) for part in parts)
        unknown = sorted(set(test) - set(train))
        if unknown:
            raise UserError(f"{parts[1]} has the class {unknown[0]!r}, which {parts[0]} lacks")
    else:
        train, test = _split(_class_files(path))
    if len(train) < 2:
        raise UserError(f"{path} has one class, {next(iter(train))!r}: at least two are needed")
    classes = tuple(train)
    train_files = [(file, i) for i, name in enumerate(classes) for file in train[name]]
    test_files = [(file, i) for i, name in enumerate(classes) for file in test.get(name, [])]
    return Data(
        classes,
        _Files(train_files, size, crop=True, flip=flip),
        _Files(test_files, size, crop=False, flip=False),
        _digest(*zip(roots, (train_files, test_files), strict=True)),
    )


def _digest(*parts: tuple[Path, list[tuple[Path, int]]]) -> str:
    """Of the names below the folder of each part: which image trains, and which one tests."""
    digest = hashlib.sha256()
    for root, files in parts:
        for file, _ in files:
            digest.update(file.relative_to(root).as_posix().encode(errors="surrogateescape"))
            digest.update(b"\0")  # in no name
        digest.update(b"\0")
    return digest.hexdigest()


def _parts(path: Path) -> tuple[Path, Path] | None:
    """The folders to train and to test on; None where `path` has class folders."""
    found = {f.name.lower(): f for f in _folders(path)}
    train, test = (
        next((found[name] for name in names if name in found), None)
        for names in (TRAIN_PARTS, TEST_PARTS)
    )
    if train is not None and test is not None:
        return train, test
    one = train or test
    # a train is a class of vehicles, too
    if one is None or not found.keys() <= {*TRAIN_PARTS, *TEST_PARTS}:
        return None
    missing = (TEST_PARTS if test is None else TRAIN_PARTS)[0]
    raise UserError(
        f"{path} has {one.name} and no {missing} beside it: add that, or take imagefolder:{one}, "
        "of which a part is held out"
    )


def _folders(path: Path) -> list[Path]:
    return [f for f in sorted(path.iterdir()) if f.is_dir() and not f.name.startswith(".")]


def _class_files(path: Path) -> dict[str, list[Path]]:
    """Image files below each class folder, in the order of their names."""
    found = {}
    for folder in _folders(path):
        # a folder may be called x.png; a link to nothing is an image that cannot be read
        files = sorted(
            file
            for file in folder.rglob("*")
            if file.suffix.lower() in SUFFIXES and not file.is_dir()
        )
        if not files:
            raise UserError(f"no images in {folder}: looked for {', '.join(SUFFIXES)}")
        found[folder.name] = files
    if not found:
        raise UserError(f"no class folders in {path}: expected {path}/<class>/<image>")
    return found


def _split(
    by_class: dict[str, list[Path]],
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """A fixed fifth of each class, at least one image, is held out."""
    train, test = {}, {}
    for name, files in by_class.items():
        if len(files) < 2:
            raise UserError(f"class {name!r} has one image: two are needed to hold one out")
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
        count = max(1, round(TEST_FRACTION * len(files)))
        test[name] = [files[i] for i in sorted(order[:count])]
        train[name] = [files[i] for i in sorted(order[count:])]
    return train, test


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    require("PIL")
    from PIL import Image

    try:
        with Image.open(path) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"no image {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the image {path}: {reason}") from None


def _open_image(path: Path) -> Any:
    require("PIL")
    from PIL import ImageOps

    with _opened(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16 bits a pixel: convert("RGB") would clip, not scale
            # I: the other orders of bytes have no point operation
            image = image.convert("I").point(lambda value: value / 256, "L")
        return image.convert("RGB")


def _square(
    size: tuple[int, int], part: float, x: float, y: float
) -> tuple[float, float, float, float]:
    """Box of a square, `part` of the shorter side, at the fractions x, y of the free space."""
    width, height = size
    side = part * min(width, height)
    left, top = x * (width - side), y * (height - side)
    return left, top, left + side, top + side


def _resized(image: Any, box: tuple[float, float, float, float], size: int) -> Tensor:
    from PIL import Image

    pixels = image.resize((size, size), Image.Resampling.BILINEAR, box=box).tobytes()
    flat = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
    return flat.view(size, size, 3).permute(2, 0, 1).contiguous()
