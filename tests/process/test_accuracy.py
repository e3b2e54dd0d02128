"""Recipes on a part of real MNIST, as far as a test run can afford it; `benchmarks/accuracy.py` trains them whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_mnist.data.splits import open_data
from helpers.runs import train_here


@pytest.fixture
def part(mnist: Path, write_set: Callable[..., Path]) -> Path:
    """MNIST's first 12 000 images for training, and 2 000 for testing."""
    data = open_data(mnist)
    parts = ((data.train, 12_000), (data.test, 2_000))
    return write_set(*(array[:count] for one, count in parts for array in (one.images[..., 0], one.labels)))


@pytest.mark.parametrize(
    ("recipe", "nproc", "steps", "least"),
    [
        ("default", 2, 50, 0.95),
        ("fast", 1, 100, 0.96),
        ("sprint", 1, 100, 0.96),
        ("accurate", 1, 80, 0.96),
        ("best", 1, 80, 0.96),
        ("fashion", 1, 80, 0.95),
        ("kuzushiji", 1, 80, 0.95),
        ("notebook", 1, 150, 0.88),
    ],
)
def test_recipe_on_a_part_of_mnist_reaches_its_accuracy(recipe, nproc, steps, least, run, part, tmp_path):
    settings = [f"--recipe={recipe}", f"--steps={steps}", "--threads=1", "--views=1"]
    if recipe == "fashion":
        settings.append("--no-flip")  # clothes may be mirrored, the digits that it is tried on here may not
    if nproc == 1:
        done = train_here(part, tmp_path / "run", *settings)
    else:
        where = (f"--data-dir={part}", f"--run-dir={tmp_path / 'run'}", "--device=cpu")
        done = run(nproc, "-m", "dist_mnist.train", *where, *settings)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["images"] == 2_000
    assert result["accuracy"] > least
