"""What several test files share: data, a world of one process, and a cache folder that is not the user's."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dist_mnist.data.idx import write_idx
from dist_mnist.data.sources.synthetic import write_digits

if TYPE_CHECKING:
    from dist_mnist.distributed.world import World


def pytest_configure() -> None:
    """One thread for torch, before it is imported: the networks of tests are small, and machines are shared.

    And signals as they usually are in what tests start: a script's background job ignores SIGINT, and nohup SIGHUP. A
    handler is not inherited by a new program, so the tests themselves still outlive a terminal that nohup shields from.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory) -> Iterator[None]:
    """No test writes into the user's cache, reads the user's data, or takes itself for a rank of a run.

    What processes that are killed leave in the folder of temporary files is of these tests, and goes with theirs.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setenv("DIST_MNIST_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("DIST_MNIST_DATA", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A folder of generated digits: 600 for training, 200 for testing, as raw idx files."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, num_train=600, num_test=200)
    return folder


@pytest.fixture(scope="session")
def finished_runs(digits, tmp_path_factory) -> list[Path]:
    """Three runs: two that differ in their seed alone, and one with another learning rate."""
    from helpers.runs import trained_here  # imports torch, which has to come after pytest_configure

    folder = tmp_path_factory.mktemp("runs")
    common = ("--steps=30", "--log-every=10")
    return [
        trained_here(digits, folder / f"run-{seed}-{lr}", f"--seed={seed}", f"--lr={lr}", *common)
        for seed, lr in ((0, 0.1), (1, 0.1), (0, 0.02))
    ]


@pytest.fixture(scope="session")
def mnist() -> Path:
    """The folder of real MNIST."""
    folder = os.environ.get("DIST_MNIST_TEST_DATA")
    if not folder:
        pytest.skip("needs real MNIST: set DIST_MNIST_TEST_DATA to the folder of its four files")
    return Path(folder)


@pytest.fixture(scope="session")
def alone() -> "World":
    """A world of one process, on the CPU."""
    import torch

    from dist_mnist.distributed.world import World

    return World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def write_set(tmp_path) -> Callable[..., Path]:
    """A function that writes four arrays as a data set; it returns its folder."""

    def write(train_images, train_labels, test_images=None, test_labels=None, folder: Path = tmp_path / "set") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for split, images, labels in (("train", train_images, train_labels), ("t10k", test_images, test_labels)):
            images = train_images if images is None else images
            labels = train_labels if labels is None else labels
            write_idx(folder / f"{split}-images-idx{images.ndim}-ubyte", images)
            write_idx(folder / f"{split}-labels-idx1-ubyte", labels)
        return folder

    return write


@pytest.fixture
def small_set(write_set) -> Path:
    """20 training and 6 test images of 4x5 pixels in 3 classes."""
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (20, 4, 5), np.uint8), rng.integers(0, 256, (6, 4, 5), np.uint8)
    return write_set(train, np.arange(20, dtype=np.uint8) % 3, test, np.arange(6, dtype=np.uint8) % 3)
