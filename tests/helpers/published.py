"""Small stand-ins for published data sets, in exactly their file formats, and a server for them."""

import gzip
import hashlib
import io
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import numpy as np
import pytest

from dist_mnist.data.sources.catalog import CATALOG
from dist_mnist.data.sources.known.extended import EMNIST_CLASSES

SHAPE = (8, 8)


class Published(NamedTuple):
    """The files of a set by name, and the expected content of the idx files converted from them, by split."""

    files: dict[str, bytes]
    splits: dict[str, tuple[np.ndarray, np.ndarray]]


def idx(array: np.ndarray) -> bytes:
    """Return an idx file, encoded by hand: big-endian uint8 or int32."""
    code = {np.dtype(np.uint8): 8, np.dtype(">i4"): 12}[array.dtype]
    return bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def npz(**arrays: np.ndarray) -> bytes:
    """Return an npz archive."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def samples(count: int, num_classes: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> tuple:
    """Return images whose brightness grows with the class, so that it can be learned, and labels of all classes."""
    rng = np.random.default_rng([seed, count])
    labels = (np.arange(count) % num_classes).astype(np.uint8)
    images = rng.integers(0, 40, (count, *shape), np.uint8)
    images[:, labels.max() % shape[0]] += (labels * (200 // num_classes)).reshape(-1, *[1] * (len(shape) - 1))
    return images, labels


def mnist(name: str) -> Published:
    """MNIST's four files."""
    splits = {prefix: samples(30, 10, seed=seed) for seed, prefix in enumerate(("train", "t10k"))}
    files = {}
    for prefix, (images, labels) in splits.items():
        files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(idx(images), mtime=0)
        files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(idx(labels), mtime=0)
    return Published(files, splits)


def emnist(name: str) -> Published:
    """One zip archive of all splits, created on macOS; images are transposed, letters numbered from 1."""
    file, wanted = io.BytesIO(), {}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("gzip/", b"")
        for number, (split, names) in enumerate(EMNIST_CLASSES.items()):
            archive.writestr(f"gzip/emnist-{split}-mapping.txt", "0 48\n")
            for part, prefix, count in (("train", "train", 150), ("test", "t10k", 70)):
                images, labels = samples(count, len(names), seed=number)
                stored = images.swapaxes(1, 2), labels + (split == "letters")
                for kind, array in zip(("images-idx3", "labels-idx1"), stored, strict=True):
                    member = f"emnist-{split}-{part}-{kind}-ubyte.gz"
                    content = idx(np.ascontiguousarray(array).astype(np.uint8))
                    archive.writestr(f"gzip/{member}", gzip.compress(content, mtime=0))
                    archive.writestr(f"__MACOSX/gzip/._{member}", b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
                if name == f"emnist-{split}":
                    wanted[prefix] = images, labels
    return Published({"gzip.zip": file.getvalue()}, wanted)


def qmnist(name: str) -> Published:
    """Labels are int32 in eight columns; the first 10 000 test images are MNIST's."""
    train, test = samples(200, 10), samples(10_050, 10, seed=1)
    files = {}
    for part, (images, labels) in (("train", train), ("test", test)):
        extended = np.arange(8 * len(labels)).reshape(-1, 8).astype(">i4")
        extended[:, 0] = labels
        files[f"qmnist-{part}-images-idx3-ubyte.gz"] = gzip.compress(idx(images), 1, mtime=0)
        files[f"qmnist-{part}-labels-idx2-int.gz"] = gzip.compress(idx(extended), 1, mtime=0)
    parts = {"t10k": slice(0, 10_000), "test50k": slice(10_000, None)}
    return Published(files, {"train": train} | {key: (test[0][rows], test[1][rows]) for key, rows in parts.items()})


def kuzushiji_49(name: str) -> Published:
    """Four npz files of one array, `arr_0`."""
    splits = {"train": samples(120, 49), "t10k": samples(60, 49, seed=1)}
    files = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        for kind, array in zip(("imgs", "labels"), splits[prefix], strict=True):
            files[f"k49-{part}-{kind}.npz"] = npz(arr_0=array)
    return Published(files, splits)


def medmnist(name: str) -> Published:
    """One npz file with three splits; labels in a column."""
    num_classes = CATALOG[name].num_classes
    colour = name in ("pathmnist", "dermamnist", "retinamnist", "bloodmnist")
    shape = (*SHAPE, 3) if colour else SHAPE
    parts = {
        part: samples(count, num_classes, shape, count) for part, count in (("train", 90), ("val", 33), ("test", 40))
    }
    arrays = {f"{part}_images": images for part, (images, _) in parts.items()}
    arrays |= {f"{part}_labels": labels[:, np.newaxis] for part, (_, labels) in parts.items()}
    both = (np.concatenate([parts[part][i] for part in ("train", "val")]) for i in (0, 1))
    return Published({f"{name}.npz": npz(**arrays)}, {"train": tuple(both), "t10k": parts["test"]})


def published(name: str) -> Published:
    """Return the stand-in for a data set of the catalogue."""
    makers = {"emnist": emnist, "qmnist": qmnist, "kuzushiji": kuzushiji_49, "mnist": mnist, "kmnist": mnist}
    return makers.get(name.split("-")[0], medmnist)(name)


class Mirror:
    """A file server that counts requests."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.requests = files, Counter[str]()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/")
                mirror.requests[name] += 1
                content = mirror.files.get(name)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def mirror_of(name: str, patch: pytest.MonkeyPatch) -> Iterator[tuple[Mirror, Published]]:
    """Context manager: serve a set's stand-in, with mirrors, sizes and checksums of the catalogue's entry patched."""
    stand_in = published(name)
    mirror = Mirror(stand_in.files)
    dataset = CATALOG[name]
    assert {file.name for file in dataset.files} == stand_in.files.keys()
    files = []
    for file in dataset.files:
        content, algorithm = stand_in.files[file.name], file.checksum.split(":")[0]
        digest = hashlib.new(algorithm, content).hexdigest()
        size = None if file.num_bytes is None else len(content)
        files.append(replace(file, num_bytes=size, checksum=f"{algorithm}:{digest}"))
    changed = {"test_labels_sha256": hashlib.sha256(idx(stand_in.splits["t10k"][1])).hexdigest()}
    if dataset.test_labels_sha256 is None:
        changed = {}
    patch.setitem(CATALOG, name, replace(dataset, mirrors=(mirror.url,), files=tuple(files), **changed))
    try:
        yield mirror, stand_in
    finally:
        mirror.close()
