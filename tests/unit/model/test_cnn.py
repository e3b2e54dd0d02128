"""The CNN family: the notebook's network to the parameter, and every relative against a plain reference."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_mnist.config.resolve import resolve
from dist_mnist.config.settings import Config
from dist_mnist.model.adversarial import fgm_perturb
from dist_mnist.model.augment.affine import RandomAffine
from dist_mnist.model.build import build_model
from dist_mnist.model.families.cnn import CNN
from dist_mnist.model.losses import Targets, average_predictions, per_sample_loss
from dist_mnist.utils.errors import UserError

KEYS = torch.arange(9, dtype=torch.int64) * 2**55 + 12345
SMALL = {"conv_channels": (3, 5), "dense_units": (16,), "kernel_size": 3}


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def reference(model: CNN, images: torch.Tensor, padding: str, strided_stages: int = 0) -> torch.Tensor:
    """Normalise, then conv, normalise, ReLU, halve for each stage, flatten in H, W, C order, dense layers, head."""
    x = (images.double() - model.pixel_mean) / model.pixel_std
    for number, stage in enumerate(model.stages):
        convolutions = [layer for layer in stage if isinstance(layer, nn.Conv2d)]
        for layer in stage:
            if isinstance(layer, nn.Conv2d):
                bias = None if layer.bias is None else layer.bias.double()
                x = F.conv2d(x, layer.weight.double(), bias, padding=padding)
                if number < strided_stages and layer is convolutions[-1]:
                    x = x[:, :, ::2, ::2]
                norm = False
            norm = norm or isinstance(layer, nn.BatchNorm2d)
            x = layer.double()(x) if isinstance(layer, nn.BatchNorm2d) else x
            x = F.relu(x) if isinstance(layer, nn.ReLU | nn.MaxPool2d) else x
        if number >= strided_stages:
            x = F.max_pool2d(x, 2)
    x = x.permute(0, 2, 3, 1).flatten(1)
    for dense in model.dense:
        x = dense.double()(x)
    return model.head.double()(x)


def test_cnn_of_the_notebook_has_its_layers():
    model = build_model(resolve({"recipe": "notebook"}), (1, 28, 28), 10).eval()
    assert model.num_parameters() == 3_274_634
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sorted(shapes.values()) == sorted(
        [(32, 1, 5, 5), (32,), (64, 32, 5, 5), (64,), (1024, 3136), (1024,), (10, 1024), (10,)]
    )
    assert model.dropout.p == pytest.approx(0.4, abs=2**-16)
    images = pixels(2, 1, 28, 28)
    assert model(images).shape == (2, 10)
    assert model(images).equal(model(images.float()))  # raw pixels, of any dtype


def test_network_with_several_views_averages_them():
    """In their probabilities: an image's own view, and pairs of views that are changed as in training."""
    warp, images = RandomAffine(rotate=15, scale=0.1, shift=2, flip=True), pixels(9, 1, 8, 8)
    plain, model = (CNN((1, 8, 8), 5, **SMALL, warp=warp, views=views).eval() for views in (1, 5))
    views = [images] + [warp.transform(images, numbers) for numbers in warp.antithetic(2).split(1)]
    expected = torch.stack([plain(view).softmax(1) for view in views]).mean(0)
    found = model(images)
    torch.testing.assert_close(found.softmax(1), expected)
    torch.testing.assert_close(found.logsumexp(1), torch.zeros(9))
    torch.testing.assert_close(model(images[4:5]), found[4:5])  # whatever images are beside it
    assert not torch.allclose(expected, plain(images).softmax(1), atol=1e-3)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.train()(images, KEYS).equal(plain.train()(images, KEYS))


def test_average_of_sure_networks_is_finite():
    """Though their probabilities of what they exclude are less than float64 holds."""
    logits = average_predictions([torch.tensor([[0.0, 2000.0]]), torch.tensor([[0.0, 1000.0]])])
    torch.testing.assert_close(logits, torch.tensor([[-1000 - math.log(2), 0.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("shape", "classes", "options"),
    [
        ((1, 28, 28), 47, {}),
        ((3, 32, 32), 10, {"conv_channels": (4, 8, 8)}),
        ((1, 17, 40), 2, {"conv_layers": 2}),
        ((2, 4, 4), 3, {"kernel_size": 7}),
        ((1, 13, 21), 3, {"padding": "valid"}),
        ((1, 24, 21), 3, {"padding": "valid", "conv_layers": 2}),
        ((1, 13, 22), 3, {"strided_stages": 1}),
        ((1, 28, 28), 3, {"strided_stages": 1, "padding": "valid", "kernel_size": 5}),
        ((1, 24, 21), 3, {"strided_stages": 2, "padding": "valid", "conv_layers": 2}),
        ((1, 8, 8), 5, {"dense_units": ()}),
        ((1, 8, 8), 5, {"dense_units": (6, 7, 8)}),
        ((1, 8, 8), 5, {"conv_channels": ()}),
    ],
)
@pytest.mark.parametrize("batch_norm", ["none", "dense", "all"])
def test_cnn_of_any_shape_computes_what_the_reference_does(shape, classes, options, batch_norm):
    statistics = {"pixel_mean": [30.0] * shape[0], "pixel_std": [70.0] * shape[0]}
    model = CNN(shape, classes, **SMALL | options, batch_norm=batch_norm, **statistics)
    images = pixels(9, *shape)
    for _ in range(3):
        model(images)  # in training: gives the normalisation running statistics
    model.eval()
    found = model(images)
    assert found.shape == (9, classes)
    expected = reference(model, images, options.get("padding", "same"), options.get("strided_stages", 0))
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)
    assert found[3:4].allclose(model.float()(images[3:4]), atol=1e-4)


def test_cnn_that_pools_first_normalises_what_is_pooled():
    options = {"conv_channels": (3, 5), "conv_layers": 2, "strided_stages": 1, "batch_norm": "all", "dense_units": ()}
    model = CNN((1, 12, 12), 4, **options, pool_first=True).train()
    assert [type(layer).__name__ for layer in model.stages[0]] == ["Conv2d", "BatchNorm2d", "ReLU"] * 2
    conv1, norm1, _, conv2, pool, norm2, _ = model.stages[1]
    x = torch.randn(7, 3, 6, 6)
    expected = F.relu(norm2(F.max_pool2d(conv2(F.relu(norm1(conv1(x)))), 2)))
    assert isinstance(pool, nn.MaxPool2d) and model.stages[1](x).equal(expected)
    without = CNN((1, 12, 12), 4, **options | {"batch_norm": "dense"}, pool_first=True)
    assert [type(layer).__name__ for layer in without.stages[1]][-2:] == ["MaxPool2d", "ReLU"]


@pytest.mark.parametrize(("batch_norm", "conv", "dense"), [("none", 0, 0), ("dense", 0, 2), ("all", 4, 2)])
def test_cnn_batch_normalisation_is_where_it_is_asked_for(batch_norm, conv, dense):
    model = CNN((1, 8, 8), 4, conv_channels=(2, 3), conv_layers=2, dense_units=(5, 6), batch_norm=batch_norm)
    layers = list(model.modules())
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in layers) == conv
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in layers) == dense
    without_bias = [layer for layer in layers if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is None]
    assert len(without_bias) == conv + dense  # the normalisation has its own


@pytest.mark.parametrize(("shape", "stages", "most"), [((1, 28, 28), 5, 4), ((1, 4, 100), 3, 2), ((1, 1, 1), 1, 0)])
def test_cnn_of_too_many_stages_is_refused(shape, stages, most):
    with pytest.raises(UserError, match=f"--conv-channels: {stages} stages .*; at most {most} fit"):
        CNN(shape, 10, conv_channels=(2,) * stages)
    assert CNN(shape, 10, conv_channels=(2,) * most)(pixels(1, *shape)).shape == (1, 10)


def test_cnn_of_more_strided_stages_than_stages_is_refused():
    with pytest.raises(UserError, match="--strided-stages 3 exceeds the 2 stages of --conv-channels"):
        CNN((1, 28, 28), 10, conv_channels=(2, 2), strided_stages=3)


def test_cnn_without_padding_of_too_many_stages_is_refused():
    with pytest.raises(UserError, match=r"3 stages without padding halve .* to nothing; at most 2 fit"):
        CNN((1, 28, 28), 10, conv_channels=(2, 2, 2), padding="valid")


def test_initial_weights_by_fan_in_are_torchs():
    model = CNN(weight_init="fan_in")
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound, weights = layer.weight[0].numel() ** -0.5, layer.weight.detach()
            assert 0.98 * bound < float(weights.abs().max()) <= bound
            assert float(weights.std()) == pytest.approx(bound * 3**-0.5, rel=0.05)
            assert not layer.bias.any()


def test_initial_weights_are_glorots_and_biases_zero():
    model = CNN()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            receptive = layer.weight[0, 0].numel()
            fans = (layer.weight.shape[0] + layer.weight.shape[1]) * receptive
            bound = (6 / fans) ** 0.5
            assert 0.98 * bound < layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
            assert layer.weight.mean().abs() < 5 * bound / layer.weight.numel() ** 0.5
            assert not layer.bias.any()


def test_initial_weights_of_another_seed_or_layer_differ():
    first, again, other, wider = (
        CNN(**SMALL | {"seed": seed, "num_classes": classes}).state_dict()
        for seed, classes in [(1, 10), (1, 10), (2, 10), (1, 12)]
    )
    assert all(first[name].equal(again[name]) for name in first)
    weights = [name for name in first if name.endswith("weight")]
    assert not any(first[name].equal(other[name]) for name in weights)
    assert all(first[name].equal(wider[name]) for name in weights if not name.startswith("head"))


def test_dropout_of_a_sample_in_any_batch_is_the_same():
    model, images = CNN(**SMALL, dropout=0.4), pixels(1, 1, 28, 28).expand(9, 1, 28, 28)
    dropped, plain = model(images, KEYS), model.eval()(images, KEYS)
    model.train()
    assert (torch.pdist(dropped) > 1).all(), "each key has its own units"
    order = torch.tensor([4, 0, 8, 2])
    for found, expected in (
        (plain, plain[:1].expand_as(plain)),
        (model(images[order], KEYS[order]), dropped[order]),
        (model(images[:1], KEYS[6:7]), dropped[6:7]),
    ):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("drop", [0.0, 0.25, 0.5])
def test_dropout_keeps_the_expected_value(drop):
    model = CNN(dropout=drop, conv_channels=(), dense_units=(), num_classes=1, image_shape=(1, 20, 20))
    nn.init.ones_(model.head.weight)
    keys = torch.arange(2000) * 7919 * 2**32
    sums = model(torch.ones(2000, 1, 20, 20), keys).detach()[:, 0]
    assert sums.mean() == pytest.approx(400, rel=0.01)
    assert sums.std() == pytest.approx((drop / (1 - drop) * 400) ** 0.5, rel=0.1)


@pytest.mark.parametrize("channels_last", [True, False])
def test_cnn_on_any_memory_order_gives_the_same(channels_last):
    config = Config(**SMALL, channels_last=channels_last, batch_norm="none")
    model = build_model(config, (3, 12, 12), 4, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]).eval()
    assert model.stages[0][0].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    images = pixels(5, 3, 12, 12)
    torch.testing.assert_close(model(images), reference(model, images, "same").float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_per_sample_loss_is_the_cross_entropy_of_each(smoothing):
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 1, 1, 2, 0])
    target = F.one_hot(labels, 4) * (1 - smoothing) + smoothing / 4
    expected = -(target * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(per_sample_loss(logits, labels, smoothing), expected)
    assert per_sample_loss(logits.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize("strided_stages", [0, 1, 2])
def test_cnn_on_a_cropped_image_counts_features_beyond_as_zero(strided_stages):
    options = {"conv_channels": (2, 3), "dense_units": (5,), "batch_norm": "dense", "strided_stages": strided_stages}
    model = CNN((1, 20, 16), 3, **options).eval()
    images = torch.rand(4, 1, 20, 16)
    features = model.stages(images[..., 4:-4, 4:-4])
    around = torch.zeros(4, 3, 5, 4)
    around[..., 1:-1, 1:-1] = features
    expected = model.head(model.dense(around.permute(0, 2, 3, 1).flatten(1)))
    torch.testing.assert_close(model(images[..., 4:-4, 4:-4]), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int16])
def test_fast_gradient_method_raises_the_loss_within_its_bound(dtype):
    """As far as asked for, to a larger loss than any random move of that length has; the network stays as it is."""
    model = CNN((1, 8, 8), 5, **SMALL, batch_norm="all", views=3, warp=RandomAffine(rotate=15)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels, amounts = pixels(9, 1, 8, 8).to(dtype), torch.arange(9) % 5, torch.linspace(0, 0.08, 9)
    moved = fgm_perturb(model, images, Targets(labels), amounts)
    assert moved.dtype == torch.float32 and not moved.requires_grad
    way = moved - images
    torch.testing.assert_close(way.flatten(1).norm(dim=1), amounts * images.float().flatten(1).norm(dim=1))
    assert model.training and all(module.training for module in model.modules())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())

    def losses(of: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return per_sample_loss(model.eval().forward_single(of), labels)

    for seed in range(20):
        other = torch.randn(way.shape, generator=torch.Generator().manual_seed(seed))
        other *= (way.flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1))[:, None, None, None]
        assert (losses(moved) > losses(images + other))[1:].all()


def test_fast_gradient_method_without_a_gradient_leaves_the_images():
    model = CNN((1, 8, 8), 5, **SMALL)
    assert fgm_perturb(model, torch.zeros(2, 1, 8, 8), Targets(torch.arange(2)), torch.full((2,), 0.1)).eq(0).all()
    images = pixels(2, 1, 8, 8)
    for certain in torch.linspace(1, 150, 100).tolist():  # slopes down to those whose squares are too small for float32
        model.head.bias.data = torch.eye(5)[0] * certain
        moved = fgm_perturb(model, images, Targets(torch.zeros(2, dtype=torch.int64)), torch.full((2,), 0.1))
        assert (moved - images).flatten(1).norm(dim=1).le(images.float().flatten(1).norm(dim=1) * 0.1001).all()
    nn.init.zeros_(model.head.weight)
    assert fgm_perturb(model, images, Targets(torch.arange(2)), torch.full((2,), 0.1)).equal(images.float())
    assert fgm_perturb(model, images[:0], Targets(torch.arange(0)), torch.zeros(0)).shape == (0, 1, 8, 8)
