"""Batch normalisation in one process: torch's own, but for running statistics that move once a step."""

import copy

import pytest
import torch
from torch import nn

from dist_mnist.model.layers.batch_norm import RunningStatistics, collect_moments, synchronise_batch_norm


def both(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """torch's layer with random scale and shift, and ours from it."""
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    ours = nn.Sequential(copy.deepcopy(layer))
    synchronise_batch_norm(ours, over_ranks=False)
    return layer, ours[0]


def move(layer: nn.Module, seen) -> None:
    statistics = RunningStatistics([layer], torch.device("cpu"))
    statistics.update(statistics.moments(seen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (9, 6)), (nn.BatchNorm2d, (5, 6, 4, 3))])
def test_batch_norm_of_one_process_equals_torchs_layer(kind, shape, dtype):
    torch.manual_seed(0)
    torchs, ours = both(kind(6))
    results = []
    for norm in (torchs, ours):
        x = (torch.linspace(-3, 9, 9 * 6 * 12).sin()[: torch.Size(shape).numel()].reshape(shape) + 2).to(dtype)
        x.requires_grad_()
        with collect_moments() as seen:
            out = norm(x)
        (out.float() ** 3).sum().backward()
        results.append((out, x.grad, norm.weight.grad, norm.bias.grad))
    for mine, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, expected)
    move(ours, seen)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    x = torch.randn(shape)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))


def test_running_statistics_of_microbatches_equal_those_of_the_whole_batch():
    torch.manual_seed(0)
    torchs, ours = both(nn.BatchNorm1d(4))
    x = torch.randn(13, 4) * 3 + 100
    torchs(x)
    with collect_moments() as seen:
        for part in x.split([1, 5, 7]):
            ours(part)
    move(ours, seen)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())


def test_forward_outside_of_a_collection_moves_nothing():
    _, ours = both(nn.BatchNorm1d(4))
    before = copy.deepcopy(ours.state_dict())
    with collect_moments() as seen:
        pass
    ours(torch.randn(5, 4))
    assert seen == {}
    torch.testing.assert_close(ours.state_dict(), before)


def test_running_statistics_of_a_single_row_stay_as_they_are():
    """torch's layer refuses it; an epoch's last batch may be one image."""
    torch.manual_seed(0)
    _, ours = both(nn.BatchNorm1d(4))
    before = copy.deepcopy([ours.running_mean, ours.running_var])
    x = torch.randn(1, 4)
    with collect_moments() as seen:
        out = ours(x)
    move(ours, seen)
    # torch computes scale * x + shift, which cancel but for the rounding of each: scale is 316 times the weight.
    largest = (x * ours.weight).abs().max().item() * ours.eps**-0.5
    torch.testing.assert_close(out[0], ours.bias, rtol=0, atol=2 * largest * 2**-24)
    torch.testing.assert_close([ours.running_mean, ours.running_var], before, rtol=0, atol=0)


def test_running_statistics_of_layers_with_other_eps_equal_torchs():
    torch.manual_seed(0)
    torchs = nn.Sequential(nn.BatchNorm1d(4, eps=0.5), nn.BatchNorm1d(4))
    ours = copy.deepcopy(torchs)
    layers = synchronise_batch_norm(ours, over_ranks=False)
    x = torch.randn(9, 4) * 3
    torchs(x)
    with collect_moments() as seen:
        ours(x)
    statistics = RunningStatistics(layers, torch.device("cpu"))
    statistics.update(statistics.moments(seen))
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
