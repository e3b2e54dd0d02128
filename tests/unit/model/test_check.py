"""Networks of users' own: what is wrong with one is a sentence before a run, and what is not exact is named."""

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_mnist.config.settings import Config
from dist_mnist.model.build import build_model
from dist_mnist.model.check import check_model
from dist_mnist.utils.errors import UserError
from helpers import networks

SHAPE, CLASSES = (1, 8, 8), 5
IMAGES = torch.randint(0, 256, (4, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def check(module, **settings) -> list[str]:
    """What is found about a module, or about what a function makes anew each time."""
    config = Config(model="mine.py:Net", **settings)

    def make():
        return build_model(
            config, SHAPE, CLASSES, [128.0], [64.0], module if isinstance(module, nn.Module) else module()
        )

    return check_model(make, IMAGES, CLASSES, config)


class Linear(nn.Module):
    """A linear classifier, to be varied."""

    def __init__(self, classes: int = CLASSES):
        super().__init__()
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(self.change(x).flatten(1))

    def change(self, x):
        return x


class NaN(Linear):
    def change(self, x):
        return x / 0 - x / 0


class Pair(Linear):
    def forward(self, x):
        return super().forward(x), x


class Integers(Linear):
    def forward(self, x):
        return super().forward(x).long()


class Unused(Linear):
    def __init__(self):
        super().__init__()
        self.other, self.another = nn.Linear(3, 4), nn.Linear(3, 4)


class Detached(Linear):
    def forward(self, x):
        return super().forward(x).detach()


class Raises(Linear):
    def change(self, x):
        raise RuntimeError("this size\ndoes not do")


class Exits(Linear):
    def change(self, x):
        raise SystemExit(3)


class OnlyOne(Linear):
    def change(self, x):
        assert len(x) == 1, "one image at a time"
        return x


class Half(Linear):
    def __init__(self):
        super().__init__()
        self.half()


class ComplexBuffer(Linear):
    def __init__(self):
        super().__init__()
        self.register_buffer("phases", torch.zeros(2, dtype=torch.complex64))


class NotRun(Linear):
    def __init__(self):
        super().__init__()
        self.never = nn.LazyLinear(3)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (nn.Flatten, r"--model mine\.py:Net has no parameters to train$"),
        (
            lambda: Linear(7),
            r"gives a tensor \(4, 7\) of float32; a network gives logits, a tensor \(4, 5\) of float32",
        ),
        (Integers, r"gives a tensor \(4, 5\) of int64; a network gives logits"),
        (Pair, "gives a tuple; a network gives logits"),
        (NaN, "logits that are not finite for the first training images"),
        (Unused, r"do not depend on other.weight, other.bias, another.weight, another.bias: take them out .* PATTERN"),
        (Detached, r"do not depend on head.weight, head.bias: take .* --freeze head.weight,head.bias"),
        (Raises, r"raised RuntimeError: this size does not do$"),
        (Exits, r"raised SystemExit: 3$"),
        (OnlyOne, "raised AssertionError: one image at a time"),
        (Half, "its parameter head.weight is float16; parameters are float32"),
        (ComplexBuffer, "its buffer .*phases is complex64, which a checkpoint cannot hold"),
        (NotRun, "its lazy parameter never.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_check_model_that_cannot_be_trained_is_refused(module, sentence):
    with pytest.raises(UserError, match=sentence):
        check(module)


class FunctionalDropout(Linear):
    def change(self, x):
        return F.dropout(x, 0.5, self.training)


class InChild(Linear):
    def __init__(self):
        super().__init__()
        self.inside = FunctionalDropout()

    def forward(self, x):
        return super().forward(x) + self.inside(x)


class PythonRandom(Linear):
    def change(self, x):
        return x * random.random()


class NumpyRandom(Linear):
    def change(self, x):
        return x * float(np.random.rand())


class Steps(Linear):
    steps = 0

    def change(self, x):
        self.steps += 1
        return x


class Remembers(Linear):
    def __init__(self):
        super().__init__()
        self.seen = []

    def change(self, x):
        self.seen.append(x)
        return x


class CountsInBuffer(Linear):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def change(self, x):
        self.calls += 1
        return x


class OwnBatchNorm(nn.BatchNorm2d):
    pass


class WithOwnBatchNorm(Linear):
    def __init__(self):
        super().__init__()
        self.norm = OwnBatchNorm(1)

    def change(self, x):
        return self.norm(x)


class NormOfBatch(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class CentresBatch(Linear):
    def __init__(self):
        super().__init__()
        self.centre = NormOfBatch()

    def change(self, x):
        return self.centre(x)


class BatchNormWithoutStatistics(Linear):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1, track_running_stats=False)

    def change(self, x):
        return self.norm(x)


class Threads(Linear):
    def __init__(self):
        super().__init__()
        self.ends = threading.Event()
        threading.Thread(target=self.ends.wait, args=(20,), daemon=True).start()


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (FunctionalDropout, "FunctionalDropout draws from torch's random number generator"),
        (InChild, r"FunctionalDropout \(inside\) draws from torch's random number generator"),
        (PythonRandom, "it draws from Python's or numpy's random number generator"),
        (NumpyRandom, "it draws from Python's or numpy's random number generator"),
        (Steps, "its forward pass changes steps, which no checkpoint holds"),
        (Remembers, "its forward pass changes seen, which no checkpoint holds"),
        (CountsInBuffer, "its forward pass changes the buffer calls"),
        (WithOwnBatchNorm, r"its forward pass changes the buffer norm\."),
        (CentresBatch, r"NormOfBatch \(centre\) mixes the samples of a batch in eval mode"),
        (BatchNormWithoutStatistics, r"GlobalBatchNorm \(norm\) mixes the samples of a batch in eval mode"),
        (Threads, "it has started 1 thread of its own"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_check_model_that_is_not_exact_is_named(module, sentence):
    [found] = check(module)
    assert __import__("re").fullmatch(sentence + ".*", found), found


class InPlace(Linear):
    def change(self, x):
        return x.mul_(2)


class Caches(Linear):
    """Makes something at its first call, and keeps it."""

    ramp = None

    def change(self, x):
        if self.ramp is None:
            self.ramp = torch.ones(8)
        return x * self.ramp


@pytest.mark.parametrize("module", [Linear, InPlace, Caches])
def test_check_model_that_is_exact_finds_nothing(module):
    before = IMAGES.clone()
    assert check(module) == [] and IMAGES.equal(before)


@pytest.mark.parametrize(
    "name", ["BatchNormDropout", "LayerNormed", "GroupNormed", "Attention", "TiedWeights", "OneParameter", "Lazy"]
)
def test_check_model_of_each_usual_kind_finds_nothing(name):
    config = Config(model=f"{networks.__file__}:{name}")
    assert check_model(lambda: build_model(config, SHAPE, CLASSES, [128.0], [64.0]), IMAGES, CLASSES, config) == []


def test_check_model_that_takes_one_size_is_refused_with_a_crop():
    with pytest.raises(UserError, match=r"^with --crop 1 --model mine.py:Net raised RuntimeError: mat1 and mat2"):
        check(Linear, crop=1)
    assert check(lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, CLASSES)), crop=1) == []


def test_check_model_with_batch_normalisation_in_parts_too_small_is_refused():
    with pytest.raises(UserError, match="--accumulate 6 leaves less than two images of 10 to a part"):
        check(
            lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, CLASSES)), batch_size=10, accumulate=6
        )
