"""Classes of pictures and idx files that no data set holds: what `dist-mnist predict` does."""

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
    """An image as the network gets it, and where it comes from."""

    file: str
    number: int | None  # in an idx file
    image: np.ndarray  # (H, W, C)


class Fitted(NamedTuple):
    """How pictures become a network's images: their shape (C, H, W); see `as_network_sees` for the others."""

    shape: tuple[int, int, int]
    fit: Fit
    light_ground: bool

    def image(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """A picture (h, w) or (h, w, c) as an image (H, W, C)."""
        return as_network_sees(pixels, self.shape, self.fit, name, self.light_ground)

    def read(self, file: BinaryIO, name: str, most_pixels: int = MOST_PIXELS) -> InputImage:
        """A picture file as an image; errors as of `read_picture` and `as_network_sees`."""
        return InputImage(name, None, self.image(read_picture(file, name, most_pixels), name))


class Prediction(Struct, frozen=True, kw_only=True):
    """An image's most probable class, its name, and the probabilities of all classes."""

    file: str
    index: int | None
    predicted: int = field(name="class")
    name: str
    probabilities: tuple[float, ...]
    seen: str | UnsetType = UNSET  # the image as the network gets it, a data: URL of a PNG file; where it is asked for


class Ensemble(NamedTuple):
    """Trained models of the same images and classes, one or several, whose probabilities are averaged."""

    models: list[TrainedModel]

    @property
    def facts(self) -> DataFacts:
        """The data that they were trained on."""
        return self.models[0].info.data

    @property
    def networks(self) -> list[Classifier]:
        """Their networks, in eval mode."""
        return [model.network for model in self.models]

    def fitted(self, fit: Fit) -> Fitted:
        """How pictures become their images."""
        return Fitted(self.facts.image_shape, fit, self.facts.light_ground)

    def predictions(self, inputs: Sequence[InputImage], found: np.ndarray) -> list[Prediction]:
        """What the probabilities `found`, (N, classes), say of N images."""
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
    """Models that predict the classes of pictures together; arguments as of `load_models`.

    Raises:
        UserError: checkpoints cannot be read or do not go together.
    """
    models = load_models(checkpoints, world, views, code)
    facts = models[0].info.data
    for model in models:
        if model.info.data.light_ground != facts.light_ground:
            raise UserError(
                f"{models[0].path} was trained on images that are {_ground(facts)}, {model.path} on such that are "
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
    """Predict the classes of pictures by networks that are averaged in their probabilities; with all classes' names.

    Args:
        sources: pictures, idx files, folders for all that is in them, and "-" for what standard input holds.
        fit: see `as_network_sees`.
        tell: told of each source that cannot be read; the others go on.
        views: as in `load_models`, as is `code`.

    Raises:
        UserError: checkpoints cannot be read or do not go together.
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
    """The pictures and idx files of a folder; a file is itself."""
    if not source.is_dir():
        return [source]
    with os_error_as(f"{source}: the folder cannot be read"):
        found = sorted(path for path in source.rglob("*") if path.is_file() and _is_image(path.relative_to(source)))
    if not found:
        raise UserError(f"{source}: there are no pictures ({', '.join(SUFFIXES)}) and no idx files of images in it")
    return found


def _is_image(path: Path) -> bool:
    """Whether a file in a folder is one, by its path there; hidden files, such as macOS' `._1.png`, are none."""
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
                    raise UserError(f"{name}: there is nothing in it")
                if begins not in (IDX_MAGIC, GZIP_MAGIC):
                    return [fitted.read(file, name)]
        images = _read_idx(path, begins == GZIP_MAGIC, Path(scratch))
    if _shape(images) != shape and images.shape[1:] == shape:
        images = images.transpose(0, 2, 3, 1)  # N x C x H x W
    if _shape(images) == shape:
        return [InputImage(name, index, image) for index, image in enumerate(images)]
    if images.dtype != np.uint8:
        raise UserError(f"{name}: its images are {images.dtype.name} {_shape(images)}; this network's are {shape}")
    return [
        InputImage(name, index, fitted.image(image, f"{name}, image {index}")) for index, image in enumerate(images)
    ]


def _read_idx(path: Path, packed: bool, scratch: Path) -> np.ndarray:
    """(N, H, W, C), of an idx file of images."""
    if packed:
        unpack(path, raw := scratch / "images")
    images = np.array(open_idx(raw if packed else path))
    if images.ndim not in (3, 4):
        raise UserError(f"{path}: an idx file of images has 3 or 4 dimensions; this one has {images.ndim}")
    return images if images.ndim == 4 else images[..., np.newaxis]


def _shape(images: np.ndarray) -> tuple[int, int, int]:
    """Channels, height, width."""
    return images.shape[3], images.shape[1], images.shape[2]
