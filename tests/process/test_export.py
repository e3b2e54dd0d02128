"""`dist-mnist export`: networks for other programs give what the checkpoint gives, or are not written."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open

from dist_mnist.data.idx import open_idx
from dist_mnist.distributed.world import World
from dist_mnist.evaluation import export as exporting
from dist_mnist.evaluation.checkpoints.load import load_models
from dist_mnist.evaluation.export import KINDS, export, load_network
from dist_mnist.utils.errors import UserError
from helpers.runs import dist_mnist, trained_here

pytestmark = pytest.mark.xdist_group("export")  # what all of these need is made once


@pytest.fixture(scope="module", params=["--views=1", "--views=3"])
def trained(digits, tmp_path_factory, request) -> Path:
    """A run with averaged weights, batch normalisation in all layers and every kind of augmentation."""
    options = ("--steps=20", "--ema-decay=0.9", "--batch-norm=all", request.param)
    changes = ("--rotate=10", "--scale=0.1", "--shear=5", "--shift=1", "--flip")
    return trained_here(digits, tmp_path_factory.mktemp("runs") / "ü run", *options, *changes)


@pytest.fixture(scope="module")
def images(digits) -> np.ndarray:
    """(200, 1, 28, 28) uint8."""
    return np.array(open_idx(digits / "t10k-images-idx3-ubyte"))[:, np.newaxis]


@pytest.fixture(scope="module")
def logits(trained, images) -> np.ndarray:
    """What the checkpoint's network makes of them."""
    [best] = load_models([trained], World.from_environment())
    with torch.inference_mode():
        return best.network(torch.from_numpy(images)).numpy()


def by_onnx(path: Path, images: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(None, {"images": images})[0]


def by_torch_export(path: Path, images: np.ndarray) -> np.ndarray:
    with path.open("rb") as file, torch.inference_mode():
        return torch.export.load(file).module()(torch.from_numpy(images)).numpy()


def by_safetensors(path: Path, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return load_network(path)(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize(("kind", "run"), [
    ("onnx", by_onnx), ("torch-export", by_torch_export), ("safetensors", by_safetensors),
])  # fmt: skip
def test_export_any_format_gives_the_checkpoints_logits(trained, images, logits, tmp_path, kind, run):
    path = tmp_path / f"network{KINDS[kind].suffix}"
    done = dist_mnist("export", "--ckpt", trained, "--format", kind, "--output", path, "--json")
    assert done.returncode == 0 and not done.stderr, done.stderr
    facts = json.loads(done.stdout)
    assert facts["input"] == "images (batch, 1, 28, 28) uint8" and facts["output"] == "logits (batch, 10) float32"
    assert facts["bytes"] == path.stat().st_size and facts["images_tried"] == 208
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    for count in (1, 3, 200):
        np.testing.assert_allclose(run(path, images[:count]), logits[:count], rtol=1e-4, atol=1e-4)


def test_export_without_output_is_named_after_the_run(trained, tmp_path):
    assert dist_mnist("export", "--ckpt", trained, "--format=safetensors", folder=tmp_path).returncode == 0
    with safe_open(tmp_path / "ü run.safetensors", "np") as file:
        facts = json.loads(file.metadata()["dist_mnist"])
        assert facts["settings"]["ema_decay"] == 0.9 and facts["data"]["num_classes"] == 10
        assert not any("optimizer" in name for name in file.keys())  # noqa: SIM118


def test_export_views_override_those_of_the_run(trained, digits, images, logits, tmp_path, request):
    path = tmp_path / "network.safetensors"
    views = 3 if request.node.callspec.params["trained"] == "--views=1" else 1
    done = dist_mnist("export", "--ckpt", trained, "--format=safetensors", "--output", path, f"--views={views}")
    assert done.returncode == 0, done.stderr
    found = by_safetensors(path, images)
    assert not np.allclose(found, logits, atol=1e-2)
    labels = np.array(open_idx(digits / "t10k-labels-idx1-ubyte"))
    expected = dist_mnist("eval", "--ckpt", trained, f"--views={views}", "--json")
    assert json.loads(expected.stdout)["correct"] == (found.argmax(1) == labels).sum()


def test_export_network_that_differs_is_not_written(trained, tmp_path, monkeypatch):
    """As by a faulty exporter, which rounds the weights to bf16."""
    honest = KINDS["safetensors"]

    def write(found, test, names, path):
        [another] = load_models([trained], World.from_environment())
        for parameter in another.network.parameters():
            parameter.data = parameter.data.bfloat16().float()
        honest.write(replace(found, network=another.network), test, names, path)

    monkeypatch.setitem(exporting.KINDS, "safetensors", honest._replace(write=write))
    (tmp_path / "network").write_text("what was there before")
    with pytest.raises(UserError, match="was not written: the exported network's logits differ"):
        export(trained, "safetensors", tmp_path / "network", None, World.from_environment())
    assert (tmp_path / "network").read_text() == "what was there before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("words", "sentence"), [
    (["--format=onx"], "'onx' is not one of 'safetensors', 'onnx', 'torch-export'"),
    (["--format=safetensors", "--output=/no/such/folder/it"], "/no/such/folder/it: cannot be written"),
    (["--data-dir=/no/such/folder"], "/no/such/folder"),
])  # fmt: skip
def test_export_invalid_option_is_refused(trained, words, sentence):
    done = dist_mnist("export", "--ckpt", trained, *words)
    said = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode == 2 and sentence in said and "Traceback" not in said, done.stderr


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_load_network_other_file_is_refused(trained, tmp_path, content):
    path = tmp_path / "it.safetensors" if content is not None else next((trained / "checkpoints").glob("*.safetensors"))
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="this is not a network exported as safetensors"):
        load_network(path)


def test_export_without_its_libraries_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs onnxscript: pip install 'dist-mnist\[onnx\]'"):
        export(trained, "onnx", tmp_path / "network.onnx", None, World.from_environment())
    assert not list(tmp_path.iterdir())
