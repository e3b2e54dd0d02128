"""Recipes on a part of real MNIST, as far as a test run can afford it; `benchmarks/accuracy.py` trains them whole."""

import json
from pathlib import Path

import pytest

from dist_mnist.data.dataset import open_data
from dist_mnist.data.idx import write_idx


@pytest.fixture(scope="module")
def part(mnist: Path, tmp_path_factory) -> Path:
    """MNIST's first 12 000 images for training, and 2 000 for testing."""
    folder, data = tmp_path_factory.mktemp("part"), open_data(mnist)
    for split, dataset, count in (("train", data.train, 12_000), ("t10k", data.test, 2_000)):
        write_idx(folder / f"{split}-images-idx3-ubyte", dataset.images[:count, ..., 0])
        write_idx(folder / f"{split}-labels-idx1-ubyte", dataset.labels[:count])
    return folder


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("recipe", "nproc", "steps", "least"),
    [
        ("default", 2, 50, 0.95),
        ("fast", 1, 100, 0.96),
        ("accurate", 1, 80, 0.96),
        ("best", 1, 50, 0.96),
        ("notebook", 1, 150, 0.88),
    ],
)
def test_a_recipe_learns(recipe, nproc, steps, least, run, part, tmp_path):
    settings = (f"--recipe={recipe}", f"--steps={steps}", "--device=cpu", "--threads=1")
    done = run(nproc, "-m", "dist_mnist.train", *settings, f"--data-dir={part}", f"--run-dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["images"] == 2_000
    assert result["accuracy"] > least
