"""Networks of torchvision and timm, the real ones: whole runs, and what is said of what they do not take."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dist_mnist.config.settings import Config
from dist_mnist.data.idx import write_idx
from dist_mnist.data.sources.synthetic import make_digits
from dist_mnist.model.build import build_model
from dist_mnist.model.check import check_model
from dist_mnist.model.layers.batch_norm import GlobalBatchNorm, synchronise_batch_norm
from dist_mnist.model.layers.dropout import dropout_keys, key_dropout
from dist_mnist.model.source import ModelSource
from dist_mnist.run.directory import RunDirectory
from dist_mnist.utils.errors import UserError
from helpers import libraries
from helpers.runs import digest, dist_mnist, losses, train_here

pytestmark = pytest.mark.xdist_group("library networks")  # they are imported once
GREY, COLOURED = (1, 28, 28), (3, 32, 32)
VIT = "img_size=28,patch_size=7,embed_dim=24,depth=2,num_heads=3,drop_path_rate=0.5,drop_rate=0.1"
RUN = ("--batch-size=24", "--log-every=1", "--checkpoint-every=2", "--steps=4", "--lr=0.001", "--threads=1",
       "--validation-fraction=0.1", "--precision=fp32")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def installed():
    libraries.find_libraries()
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[tuple[int, int, int], Path]:
    """Generated digits as folders: grey, and larger in three colours."""
    folders = {GREY: tmp_path_factory.mktemp("grey"), COLOURED: tmp_path_factory.mktemp("coloured")}
    for split, name, count in (("train", "train", 120), ("test", "t10k", 30)):
        grey, labels = make_digits(count, 0, split)
        large = np.pad(grey, ((0, 0), (2, 2), (2, 2)))
        write_idx(folders[GREY] / f"{name}-images-idx3-ubyte", grey)
        write_idx(folders[COLOURED] / f"{name}-images-idx4-ubyte", np.stack([large, 255 - large, large // 2], axis=-1))
        for folder in folders.values():
            write_idx(folder / f"{name}-labels-idx1-ubyte", labels)
    return folders


def build(model: str, arguments: str = "", shape: tuple[int, int, int] = GREY) -> nn.Module:
    return ModelSource.parse(model).load(shape, 10, arguments)()


def check(model: str, arguments: str = "", shape: tuple[int, int, int] = GREY) -> list[str]:
    config = Config(model=model, model_args=arguments)
    pixels = torch.randint(0, 256, (4, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    statistics = [33.0] * shape[0], [70.0] * shape[0]
    return check_model(lambda: build_model(config, shape, 10, *statistics), pixels, 10, config)


@pytest.mark.parametrize(
    ("model", "arguments", "shape", "format"),
    [
        ("torchvision:resnet18", "", GREY, "onnx"),
        ("torchvision:regnet_x_400mf", "", COLOURED, "safetensors"),  # which cannot be made on the meta device
        ("timm:resnet10t", "", COLOURED, "torch-export"),
        ("timm:vit_tiny_patch16_224", VIT, GREY, "onnx"),
    ],
)
def test_run_resumes_to_the_same_bits_and_serves_all_commands(images, tmp_path, model, arguments, shape, format):
    options = (*RUN, f"--model={model}", f"--model-args={arguments}")
    run = RunDirectory(tmp_path / "run")
    whole = train_here(images[shape], run.path, *options)
    assert (whole.returncode, whole.stderr) == (0, "")
    last = run.checkpoints.paths()[-1]
    end = digest(run)
    last.unlink()
    again = train_here(images[shape], run.path, *options)
    assert again.returncode == 0 and "after step 2" in again.stdout, again.stderr
    assert digest(run) == end

    evaluated = dist_mnist("eval", "--ckpt", last, "--device=cpu")
    accuracy = re.search(r"test accuracy (\S+)", whole.stdout)
    assert accuracy and accuracy[0] in evaluated.stdout, evaluated.stderr
    exported = dist_mnist("export", "--ckpt", last, "--format", format, "--output", tmp_path / "network")
    assert exported.returncode == 0 and (tmp_path / "network").stat().st_size, exported.stderr
    predicted = dist_mnist("predict", next(images[shape].glob("t10k-images-*")), "--ckpt", last)
    assert predicted.returncode == 0, predicted.stderr


@pytest.mark.parametrize("model", ["torchvision:resnet18", "timm:mobilenetv3_small_050"])
def test_two_processes_have_the_loss_curve_of_one(images, run, tmp_path, model):
    options = (f"--model={model}", *RUN)
    one = train_here(images[GREY], tmp_path / "one", *options)
    assert one.returncode == 0, one.stderr
    settings = (f"--data-dir={images[GREY]}", f"--run-dir={tmp_path / 'two'}", "--device=cpu", "--no-tensorboard")
    two = run(2, libraries.__file__, *settings, *options)
    assert two.returncode == 0, two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_batch_norm_with_activation_of_timm_becomes_global_and_computes_the_same():
    from timm.layers import BatchNormAct2d

    own, ours = BatchNormAct2d(6), BatchNormAct2d(6)
    synchronise_batch_norm(ours, over_ranks=False)
    x = torch.randn(5, 6, 4, 4)
    assert type(ours) is not type(own) and torch.allclose(own(x), ours(x), atol=1e-6)
    model = build("timm:mobilenetv3_small_050")
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert any(isinstance(layer, BatchNormAct2d) for layer in norms)
    assert len(synchronise_batch_norm(model, over_ranks=False)) == len(norms)
    assert all(isinstance(layer, GlobalBatchNorm) for layer in norms)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_stochastic_depth_of_a_sample_is_the_same_in_any_batch(library):
    from timm.layers import DropPath
    from torchvision.ops import StochasticDepth

    layer = nn.Sequential(StochasticDepth(0.25, "row") if library == "torchvision" else DropPath(0.25))
    key_dropout(layer)
    x, keys = torch.ones(4000, 3), torch.arange(4000)
    with dropout_keys(keys):
        whole = layer(x)
    with dropout_keys(keys[1000:]):
        part = layer(x[1000:])
    assert torch.equal(whole[1000:], part)
    assert whole.unique().tolist() == [0, pytest.approx(4 / 3)] and (whole == whole[:, :1]).all()
    assert (whole > 0).float().mean() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize(
    ("model", "arguments", "shape"),
    [
        ("torchvision:googlenet", "", GREY),
        ("torchvision:efficientnet_b0", "", GREY),
        ("torchvision:mobilenet_v3_small", "", COLOURED),
        ("timm:mobilenetv3_small_050", "drop_path_rate=0.1", GREY),
        ("timm:vit_tiny_patch16_224", VIT, GREY),
    ],
)
def test_network_is_exact(model, arguments, shape):
    assert check(model, arguments, shape) == []


def test_network_that_drops_by_a_function_is_named():
    [found] = check("timm:resnet10t", "drop_rate=0.2")
    assert found.startswith("ResNet draws from torch's random number generator")


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        ("torchvision:resnet81", "", "unknown network of torchvision: 'resnet81', did you mean 'resnet18'?"),
        ("torchvision:fasterrcnn_resnet50_fpn", "", "unknown network of torchvision"),  # which classifies no images
        ("timm:resnet10", "", "unknown network of timm: 'resnet10', did you mean 'resnet"),
        ("torchvision:resnet18", "weights=DEFAULT", "--model-args weights: to load weights of another network"),
        ("timm:resnet10t", "pretrained=true", "pretrained: to load weights of another network, give --init"),
        ("timm:resnet10t", "checkpoint_path=a.pt", "--model-args checkpoint_path: to load weights of another"),
        ("timm:resnet10t", "in_chans=3", "--model-args in_chans: the run's images and settings determine this"),
        ("timm:resnet10t", "num_classes=3", "image_shape and num_classes come from the data"),
        ("torchvision:resnet18", "widht_per_group=3",
         "--model-args: unknown argument of torchvision:resnet18: 'widht_per_group', did you mean 'width_per_group'?"),
        ("timm:resnet10t", "stem_widht=3",
         "--model-args: unknown argument of timm:resnet10t: 'stem_widht', did you mean 'stem_width'?"),
        ("torchvision:vit_b_16", "patch_size=7", "--model-args patch_size: torchvision:vit_b_16 sets this itself"),
        ("timm:vit_tiny_patch16_224", "", "raised AssertionError: .*28x28 pixels: try --model-args img_size=28"),
        ("torchvision:alexnet", "", "Output size is too small .the images have 28x28 pixels.$"),
        ("torchvision:googlenet", "aux_logits=true", "returns a GoogLeNetOutputs; expected logits"),
        ("timm:resnet10t", "features_only=true", "returns a list; expected logits"),
    ],
)  # fmt: skip
def test_what_a_network_does_not_take_is_a_sentence(model, arguments, says):
    with pytest.raises(UserError, match=says):
        check(model, arguments)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import torch_that_is_not_here", r"No module named 'torch_that_is_not_here'\): pip install timm"),
        ("raise RuntimeError('operator torchvision::nms does not exist')",
         r"RuntimeError: operator torchvision::nms does not exist\): install the build of torchvision for torch"),
    ],
)  # fmt: skip
def test_library_that_cannot_be_imported_is_a_sentence(tmp_path, monkeypatch, code, says):
    (tmp_path / "timm.py").write_text(code)
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"--model timm:NAME needs timm, which cannot be imported here .{says}"):
        build("timm:resnet10t")
