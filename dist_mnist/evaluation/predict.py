"""Prediction of the classes of pictures and idx files, for `dist-mnist predict`."""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from msgspec import UNSET, Struct, UnsetType, field

from dist_mnist.data.convert.pictures import MOST_PIXELS, SUFFIXES
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.idx import open_idx, unpack
from dist_mnist.distributed.world import World
from dist_mnist.evaluation.checkpoints.load import TrainedModel, load_models
from dist_mnist.evaluation.choices import Fit
from dist_mnist.evaluation.evaluate import predict
from dist_mnist.evaluation.pictures import as_network_sees, read_picture
from dist_mnist.model.classifier import Classifier
from dist_mnist.run.records import DataFacts
from dist_mnist.utils.errors import UserError, os_error_as

IDX_MAGIC, GZIP_MAGIC = b"\0\0", b"\x1f\x8b"
STANDARD_INPUT = Path("-")


class InputImage(NamedTuple):
    """An input image of the network, and its source."""

    file: str
    number: int | None  # its index in an idx file
    image: np.ndarray  # (H, W, C)


class Fitted(NamedTuple):
    """The conversion of pictures to a network's input of `shape` (C, H, W); other fields as for `as_network_sees`."""

    shape: tuple[int, int, int]
    fit: Fit
    light_ground: bool

    def image(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """Convert a picture (h, w) or (h, w, c) to an image (H, W, C)."""
        return as_network_sees(pixels, self.shape, self.fit, name, self.light_ground)

    def read(self, file: BinaryIO, name: str, most_pixels: int = MOST_PIXELS) -> InputImage:
        """Read a picture file as an image; raises like `read_picture` and `as_network_sees`."""
        return InputImage(name, None, self.image(read_picture(file, name, most_pixels), name))


class Prediction(Struct, frozen=True, kw_only=True):
    """An image's most probable class, its name, and the probabilities of all classes."""

    file: str
    index: int | None
    predicted: int = field(name="class")
    name: str
    probabilities: tuple[float, ...]
    seen: str | UnsetType = UNSET  # on request: the network's input image, a data: URL of a PNG file


class Ensemble(NamedTuple):
    """One or several trained models for the same images and classes, whose probabilities are averaged."""

    models: list[TrainedModel]

    @property
    def facts(self) -> DataFacts:
        """The data that the models were trained on."""
        return self.models[0].info.data

    @property
    def networks(self) -> list[Classifier]:
        """The networks, in eval mode."""
        return [model.network for model in self.models]

    def fitted(self, fit: Fit) -> Fitted:
        """Return the conversion of pictures to the networks' input."""
        return Fitted(self.facts.image_shape, fit, self.facts.light_ground)

    def predictions(self, inputs: Sequence[InputImage], found: np.ndarray) -> list[Prediction]:
        """Return the predictions for N images with the probabilities `found`, (N, classes)."""
        names, classes = self.facts.names, found.argmax(1).tolist()
        return [
            Prediction(
                file=one.file, index=one.number, predicted=best, name=names[best], probabilities=tuple(row.tolist())
            )
            for one, best, row in zip(inputs, classes, found, strict=True)
        ]


def load_ensemble(
    checkpoints: Sequence[Path], world: World, views: int | None = None, code: Sequence[str] = ()
) -> Ensemble:
    """Load models that predict the classes of pictures together; arguments as for `load_models`.

    Raises:
        UserError: a checkpoint cannot be read, or the checkpoints do not match.
    """
    models = load_models(checkpoints, world, views, code)
    facts = models[0].info.data
    for model in models:
        if model.info.data.light_ground != facts.light_ground:
            raise UserError(
                f"{models[0].path} was trained on images that are {_ground(facts)}, {model.path} on images that are "
                f"{_ground(model.info.data)}: they cannot be used together"
            )
    return Ensemble(models)


def predict_images(
    sources: list[Path],
    checkpoints: list[Path],
    fit: Fit,
    world: World,
    tell: Callable[[UserError], None],
    views: int | None = None,
    code: Sequence[str] = (),
) -> tuple[list[Prediction], list[InputImage], tuple[str, ...]]:
    """Predict the classes of pictures by the averaged probabilities of checkpoints.

    Args:
        sources: pictures, idx files, folders (searched recursively), and "-" for standard input.
        fit: as for `as_network_sees`.
        tell: called with the error of each source that cannot be read; the other sources are still predicted.
        views, code: as for `load_models`.

    Returns:
        The predictions, the networks' input images, and the names of all classes.

    Raises:
        UserError: a checkpoint cannot be read, or the checkpoints do not match.
    """
    ensemble = load_ensemble(checkpoints, world, views, code)
    names = ensemble.facts.names
    inputs = list(_read_all(sources, ensemble.fitted(fit), tell))
    if not inputs:
        return [], [], names
    images = np.stack([one.image for one in inputs])
    dataset = IdxDataset(images, np.zeros(len(images), np.int64))
    found = predict(ensemble.networks, dataset, world)
    return ensemble.predictions(inputs, found.numpy()), inputs, names


def _ground(facts: DataFacts) -> str:
    return "dark on light" if facts.light_ground else "light on dark, or coloured"


def _read_all(sources: list[Path], fitted: Fitted, tell: Callable[[UserError], None]) -> Iterator[InputImage]:
    for source in sources:
        try:
            files = _files(source)
        except UserError as error:
            tell(error)
            continue
        for file in files:
            try:
                yield from _read(file, fitted)
            except UserError as error:
                tell(error)


def _files(source: Path) -> list[Path]:
    """List the pictures and idx files of a folder; for a file, the file alone."""
    if not source.is_dir():
        return [source]
    with os_error_as(f"{source}: the folder cannot be read"):
        found = sorted(path for path in source.rglob("*") if path.is_file() and _is_image(path.relative_to(source)))
    if not found:
        raise UserError(f"{source}: the folder has no pictures ({', '.join(SUFFIXES)}) and no idx files of images")
    return found


def _is_image(path: Path) -> bool:
    """Return whether a file in a folder is a picture or an idx file, by its relative path; hidden ones do not count."""
    if any(name.startswith(".") for name in path.parts):
        return False
    return path.suffix.lower() in SUFFIXES or "idx3" in path.name or "idx4" in path.name


def _read(path: Path, fitted: Fitted) -> list[InputImage]:
    shape = fitted.shape
    name = "standard input" if path == STANDARD_INPUT else str(path)
    with tempfile.TemporaryDirectory() as scratch:
        with os_error_as(f"{name}: cannot be read"):
            if path == STANDARD_INPUT:
                path = Path(scratch) / name
                path.write_bytes(sys.stdin.buffer.read())
            with open(path, "rb") as file:
                begins = file.read(2)
                file.seek(0)
                if not begins:
                    raise UserError(f"{name}: is empty")
                if begins not in (IDX_MAGIC, GZIP_MAGIC):
                    return [fitted.read(file, name)]
        images = _read_idx(path, begins == GZIP_MAGIC, Path(scratch))
    if _shape(images) != shape and images.shape[1:] == shape:
        images = images.transpose(0, 2, 3, 1)  # N x C x H x W
    if _shape(images) == shape:
        return [InputImage(name, index, image) for index, image in enumerate(images)]
    if images.dtype != np.uint8:
        raise UserError(
            f"{name}: its images are {images.dtype.name} {_shape(images)}, but this network's input is {shape} "
            "(channels, height, width); only uint8 images can be fitted to it"
        )
    return [
        InputImage(name, index, fitted.image(image, f"{name}, image {index}")) for index, image in enumerate(images)
    ]


def _read_idx(path: Path, packed: bool, scratch: Path) -> np.ndarray:
    """Read an idx file of images: (N, H, W, C)."""
    if packed:
        unpack(path, raw := scratch / "images")
    images = np.array(open_idx(raw if packed else path))
    if images.ndim not in (3, 4):
        raise UserError(f"{path}: an idx file of images has 3 or 4 dimensions; this one has {images.ndim}")
    return images if images.ndim == 4 else images[..., np.newaxis]


def _shape(images: np.ndarray) -> tuple[int, int, int]:
    """Return (channels, height, width)."""
    return images.shape[3], images.shape[1], images.shape[2]
