"""The package's parts in other training loops: the examples, as a user starts them, and torch's own DataLoader."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dist_mnist
from dist_mnist import GlobalOrder, Loader, ShardedBatchSampler, World, collate, open_data
from helpers import HANGS_AFTER_S
from helpers.runs import losses

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(example: str, *words: object, nproc: int = 1) -> str:
    """What an example prints."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"] if nproc > 1 else []
    command = [sys.executable, *torchrun, EXAMPLES / f"{example}.py", *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=HANGS_AFTER_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_package_names_are_there_and_others_are_not():
    for name in dist_mnist.__all__:
        assert getattr(dist_mnist, name).__module__.startswith("dist_mnist."), name
    with pytest.raises(AttributeError, match="no attribute 'Lodaer'"):
        _ = dist_mnist.Lodaer


def test_package_import_loads_neither_torch_nor_numpy():
    code = "import dist_mnist, sys; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANGS_AFTER_S)


@pytest.mark.parametrize("workers", [0, 2])
def test_sampler_in_torchs_loader_gives_the_batches_of_ours(digits, workers):
    data = open_data(str(digits), validation_fraction=0.1, seed=3)
    order = GlobalOrder(num_samples=len(data.train), global_batch_size=64, seed=5)
    steps = range(7, 12)  # over the end of an epoch, whose last batch is shorter
    world = World(1, 3, 1, 3, torch.device("cpu"))
    sampler = ShardedBatchSampler(order, steps, world.rank, world.size)
    theirs = torch.utils.data.DataLoader(data.train, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
    ours = Loader(data.train, order, steps, world)
    assert len(theirs) == len(ours) == 5
    for their, our in zip(theirs, ours, strict=True):
        assert torch.equal(their.images, our.images) and their.images.shape[1:] == (1, 28, 28)
        assert torch.equal(their.labels, our.labels) and torch.equal(their.ids, our.ids)


def test_cnn_without_keys_drops_at_random_in_training_alone(digits):
    model = dist_mnist.CNN(conv_channels=(2,), dense_units=(64,), dropout=0.5)
    images = collate(open_data(digits).test.__getitems__(range(4))).images
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_example_in_plain_pytorch_two_ranks_agree_with_one(digits):
    """With a batch size that two ranks cannot share equally in an epoch's last batch, the gradients are the same."""
    one, two = (run("plain", digits, 9, nproc=nproc) for nproc in (1, 2))
    (accuracy, loss), (_, other) = (map(float, re.findall(r"[\d.]+", line.replace(",", " "))) for line in (one, two))
    assert accuracy > 30 and loss == pytest.approx(other, abs=2e-4)


def test_example_with_a_network_of_ones_own_two_ranks_agree_with_one(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for nproc in (1, 2):
        assert "test accuracy" in run("own_network", digits, 6, nproc=nproc)
        [run_dir] = Path("runs").iterdir()
        run_dir.rename(str(nproc))
    assert losses(Path("1"))[0] == pytest.approx(losses(Path("2"))[0], rel=1e-3)


@pytest.mark.parametrize(("example", "nproc"), [("with_accelerate", 2), ("with_lightning", 1)])
def test_example_in_another_framework_learns(digits, example, nproc):
    pytest.importorskip(example.removeprefix("with_"))
    [accuracy] = re.findall(r"test accuracy ([\d.]+)%", run(example, digits, 40, nproc=nproc))
    assert float(accuracy) > 60
