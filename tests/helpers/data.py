"""Small data sets in the formats that users have: tables, arrays, archives and folders of picture files."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dist_mnist.data.sources.synthetic import make_digits


class Pictures(NamedTuple):
    """Images (N, H, W) or (N, H, W, 3) uint8 and labels (N,), for training and test."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def some_digits(num_train: int = 120, num_test: int = 40) -> Pictures:
    """Return generated digits."""
    return Pictures(*make_digits(num_train, seed=1), *make_digits(num_test, seed=1, split="test"))


def some_colours(num_train: int = 60, num_test: int = 20, side: int = 32, classes: int = 10) -> Pictures:
    """Return colour noise whose mean depends on the class, so that the classes can be learned."""
    rng = np.random.default_rng(5)
    parts = []
    for count in (num_train, num_test):
        labels = np.arange(count, dtype=np.uint8) % classes
        means = np.stack([labels * 20 + 20, 220 - labels * 20, labels % 3 * 80 + 20], 1)[:, None, None, :]
        parts += [(means + rng.integers(-15, 16, (count, side, side, 3))).astype(np.uint8), labels]
    return Pictures(*parts)


def encoded(image: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """Return the bytes of a picture file."""
    Image.fromarray(image).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def write_pictures(folder: Path, images: np.ndarray, labels: Sequence[object], start: int = 0) -> Path:
    """Write a PNG file for each image, in one subfolder per class, named by index to preserve the order."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True), start):
        path = folder / str(label) / f"{index:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))
    return folder


def write_splits(folder: Path, data: Pictures, names: Sequence[str] = ()) -> Path:
    """Write folders `train` and `test` of pictures."""
    for split, images, labels in (("train", *data[:2]), ("test", *data[2:])):
        write_pictures(folder / split, images, [names[label] if names else label for label in labels])
    return folder


def write_csv(
    path: Path, images: np.ndarray, labels: Sequence[object], header: bool = True, label_last: bool = False
) -> Path:
    """Write a CSV file with a row for each image, as on Kaggle."""
    pixels = images.reshape(len(images), -1)
    lines = []
    names = [f"pixel{number}" for number in range(pixels.shape[1])]
    for label, row in [("label", names)] * header + list(zip(labels, pixels.tolist(), strict=True)):
        cells = [str(cell) for cell in row]
        lines.append(",".join([*cells, str(label)] if label_last else [str(label), *cells]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def write_npz(path: Path, data: Pictures, names: str = "keras") -> Path:
    """Write an npz file of four arrays, named as in Keras or as in MedMNIST (labels N x 1)."""
    keys = {
        "keras": ("x_train", "y_train", "x_test", "y_test"),
        "medmnist": ("train_images", "train_labels", "test_images", "test_labels"),
    }[names]
    arrays = [array[:, None] if names == "medmnist" and array.ndim == 1 else array for array in data]
    np.savez_compressed(path, **dict(zip(keys, arrays, strict=True)))
    return path


def write_parquet(path: Path, images: np.ndarray, labels: Sequence[object], names: Sequence[str] | None = None) -> Path:
    """Write a shard as Hugging Face does: structs of bytes and path, labels, and the class names as metadata."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"bytes": encoded(image), "path": f"{index}.png"} for index, image in enumerate(images)]
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kind = pa.int64() if names is not None else None
    values = [int(label) for label in labels] if names is not None else list(labels)
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if names is not None:
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    table = pa.table({"image": pa.array(rows, picture), "label": pa.array(values, kind)})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=16)
    return path


def write_cifar(folder: Path, data: Pictures, names: Sequence[str], fine: int = 0) -> Path:
    """Write CIFAR-10's binary version in two batches and a test batch, or CIFAR-100's with `fine` fine classes."""
    folder.mkdir(parents=True, exist_ok=True)

    def records(images: np.ndarray, labels: np.ndarray) -> bytes:
        coarse = [labels // 5] if fine else []
        columns = [*coarse, labels, images.transpose(0, 3, 1, 2).reshape(len(images), -1).T]
        return np.ascontiguousarray(np.vstack(columns).T.astype(np.uint8)).tobytes()

    train, test = records(*data[:2]), records(*data[2:])
    if fine:
        (folder / "train.bin").write_bytes(train)
        (folder / "test.bin").write_bytes(test)
        (folder / "fine_label_names.txt").write_text("\n".join(names) + "\n\n")
        (folder / "coarse_label_names.txt").write_text("\n".join(f"coarse {n}" for n in range(fine // 5)) + "\n")
        return folder
    size = len(train) // len(data.train_images)
    middle = len(data.train_images) // 2 * size
    (folder / "data_batch_1.bin").write_bytes(train[:middle])
    (folder / "data_batch_2.bin").write_bytes(train[middle:])
    (folder / "test_batch.bin").write_bytes(test)
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    return folder
