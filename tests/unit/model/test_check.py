"""Networks of users' own: what is wrong with one is a sentence before a run, and what is not exact is named."""

import itertools
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

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
        torch.manual_seed(0)
        given = module if isinstance(module, nn.Module) else module()
        return build_model(config, SHAPE, CLASSES, [128.0], [64.0], given)

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


class ExtraState(Linear):
    def get_extra_state(self):
        return {"a": 1}


class StateChanges(Linear):
    """Its state_dict is what a function makes of it."""

    def __init__(self, change):
        super().__init__()
        self.head.register_state_dict_post_hook(lambda module, state, prefix, _: change(state, f"{prefix}bias"))


def renames(state, name):
    state["module.last.bias"] = state.pop(name)


def clones(state, name):
    state[name] = state[name].clone()


def forgets(state, name):
    del state[name]


class Expanded(Linear):
    def __init__(self):
        super().__init__()
        self.register_buffer("ids", torch.arange(8).expand(4, 8))


class Sparse(Linear):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 64, sparse=True)

    def change(self, x):
        return x.flatten(1) + self.table((x.mean((1, 2, 3)) > 0).long())


class Scripted(Linear):
    def __init__(self):
        super().__init__()
        self.block = torch.jit.script(nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5)))

    def change(self, x):
        return self.block(x)


class Checkpointed(Linear):
    def __init__(self, layer):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(1, 1, 1), layer)

    def change(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


class OptimizerInside(Linear):
    def __init__(self):
        super().__init__()
        self.head.weight.register_post_accumulate_grad_hook(lambda parameter: None)


class Probabilities(Linear):
    def forward(self, x):
        return super().forward(x).softmax(1)


class ListOfLayers(Linear):
    def __init__(self):
        super().__init__()
        self.layers = {"first": nn.Linear(64, 64)}

    def change(self, x):
        return self.layers["first"](x.flatten(1))


class KeepsHistory(Linear):
    def forward(self, x):
        self.kept = [super().forward(x)]
        return self.kept[0]


class Broken(BaseException):
    def __str__(self):
        raise RuntimeError


class RaisesBroken(Linear):
    def change(self, x):
        raise Broken


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
            r"returns a tensor \(4, 7\) of float32; expected logits, a tensor \(4, 5\) of float32",
        ),
        (Integers, r"returns a tensor \(4, 5\) of int64; expected logits"),
        (Pair, "returns a tuple; expected logits"),
        (NaN, "logits that are not finite for the first training images"),
        (Unused, r"do not depend on other.weight, other.bias, another.weight, another.bias: remove them .* PATTERN"),
        (Detached, r"do not depend on head.weight, head.bias: remove .* --freeze head.weight,head.bias"),
        (Raises, r"raised RuntimeError: this size does not do$"),
        (Exits, r"raised SystemExit: 3$"),
        (OnlyOne, "raised AssertionError: one image at a time"),
        (Half, "its parameter head.weight is float16; parameters must be float32"),
        (ComplexBuffer, "its buffer .*phases is complex64, which a checkpoint cannot hold"),
        (NotRun, "its lazy parameter never.weight"),
        (ExtraState, "its state_dict has _extra_state, which is not a parameter or buffer"),
        (lambda: StateChanges(renames), "its state_dict has last.bias, which is not"),
        (lambda: StateChanges(clones), "its state_dict has head.bias, which is not"),
        (lambda: StateChanges(forgets), "its state_dict lacks the parameter head.bias"),
        (Expanded, r"elements of ids share memory, as after expand: \.clone"),
        (Sparse, "the gradient of table.weight is sparse"),
        (Scripted, "block is compiled by torch.jit"),
        (lambda: Checkpointed(nn.BatchNorm2d(1)), r"recomputes GlobalBatchNorm \(block.1\) by activation"),
        (lambda: Checkpointed(nn.Dropout(0.5)), r"recomputes KeyedDropout \(block.1\) by"),
        (Probabilities, "returns probabilities; the loss needs logits"),
        (ListOfLayers, "layers holds layers that are not registered with torch, .* make it an nn.ModuleList"),
        (OptimizerInside, "its parameter head.weight has a post-accumulate-grad hook"),
        (KeepsHistory, "cannot be copied \\(copy.deepcopy\\) after a forward pass"),
        (RaisesBroken, "raised Broken$"),
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


class CentresItself(Linear):
    def forward(self, x):
        x = x.flatten(1)
        return self.head(x - x.mean(0))


class CountsImages(CountsInBuffer):
    def change(self, x):
        self.calls += (x > 0).sum()
        return x


class CountsUnsaved(CountsInBuffer):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)


class Threads(Linear):
    def __init__(self):
        super().__init__()
        threading.Thread(target=threading.Event().wait, args=(20,), daemon=True).start()


class CountsInDict(Linear):
    def __init__(self):
        super().__init__()
        self.counts = {"calls": [0]}

    def change(self, x):
        self.counts["calls"][0] += 1
        return x


class MovesTensor(Linear):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(8)

    def change(self, x):
        self.mean += 1
        return x


class CountsOutside(Linear):
    calls = itertools.count()

    def change(self, x):
        return x * (1 + 1e-5 * next(CountsOutside.calls))


class GrowsBuffers(Linear):
    def change(self, x):
        self.register_buffer(f"more{len(self._buffers)}", torch.zeros(1))
        return x


class RandomBuffer(Linear):
    def __init__(self):
        super().__init__()
        noise = np.random.default_rng().standard_normal(8).astype(np.float32)
        self.register_buffer("noise", torch.from_numpy(noise), persistent=False)

    def change(self, x):
        return x + self.noise


class Shuffled(Linear):
    def __init__(self):
        super().__init__()
        self.order = list(range(64))
        random.SystemRandom().shuffle(self.order)

    def change(self, x):
        return x.flatten(1)[:, self.order]


class Squeezes(Linear):
    def forward(self, x):
        return super().forward(x).squeeze()


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (FunctionalDropout, "FunctionalDropout draws from torch's random number generator"),
        (InChild, r"FunctionalDropout \(inside\) draws from torch's random number generator"),
        (PythonRandom, "it draws from Python's or numpy's random number generator"),
        (NumpyRandom, "it draws from Python's or numpy's random number generator"),
        (Steps, "its forward pass changes steps, which no checkpoint holds"),
        (Remembers, "its forward pass changes seen, which no checkpoint holds"),
        (CountsImages, "its forward pass changes the buffer calls"),
        (CountsUnsaved, "its forward pass changes the buffer calls"),
        (CentresItself, "CentresItself mixes the samples of a batch in eval mode"),
        (WithOwnBatchNorm, r"its forward pass changes the buffer norm\."),
        (CentresBatch, r"NormOfBatch \(centre\) mixes the samples of a batch in eval mode"),
        (BatchNormWithoutStatistics, r"GlobalBatchNorm \(norm\) mixes the samples of a batch in eval mode"),
        (Threads, "it starts 1 thread"),
        (CountsInDict, "its forward pass changes counts, which no checkpoint holds"),
        (MovesTensor, "its forward pass changes mean, which no checkpoint holds"),
        (CountsOutside, "it returns different logits for the same images"),
        (GrowsBuffers, "its forward pass changes the buffer more"),
        (RandomBuffer, "its noise differs each time that it is built"),
        (Shuffled, "it returns different logits each time that it is built"),
        (Squeezes, r"it fails on a batch of one sample \(.* returns a tensor \(5,\)"),
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


class SpectralNorm(Linear):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.head)


def test_check_model_whose_buffer_moves_by_itself_is_exact_with_one_pass_in_a_step():
    for module in (SpectralNorm, CountsInBuffer):
        assert check(module) == []
        for settings in ({"accumulate": 2}, {"invariant": True}):
            [found] = check(module, **settings)
            assert found.startswith("its forward pass changes the buffer")


class KeepsFeatures(Linear):
    def change(self, x):
        self.features = x * self.head.weight.mean()
        return self.features


class OldWeightNorm(Linear):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(self.head)


class Pruned(Linear):
    def __init__(self):
        super().__init__()
        prune.l1_unstructured(self.head, "weight", 0.5)


class ParameterInList(Linear):
    def __init__(self):
        super().__init__()
        self.weights = [self.head.weight]

    def forward(self, x):
        return F.linear(x.flatten(1), self.weights[0], self.head.bias)


class MakesBuffer(Linear):
    def change(self, x):
        if not hasattr(self, "ramp"):
            self.register_buffer("ramp", torch.linspace(0, 1, 8))
        return x * self.ramp


class StandardisesWeights(Linear):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.other = nn.Conv2d(2, 1, 3, padding=1)

    def change(self, x):
        weight = self.other.weight
        return F.conv2d(self.conv(x), weight - weight.view(1, -1).mean(1).view(1, 1, 1, 1), padding=1)

    def forward(self, x):
        return super().forward(x) + self.other.bias


class CheckpointedLayers(Linear):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1))

    def change(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


@pytest.mark.parametrize(
    "module",
    [
        Linear,
        InPlace,
        Caches,
        KeepsFeatures,
        OldWeightNorm,
        Pruned,
        ParameterInList,
        MakesBuffer,
        StandardisesWeights,
        CheckpointedLayers,
    ],
)
def test_check_model_that_is_exact_finds_nothing(module):
    before = IMAGES.clone()
    assert check(module) == [] and IMAGES.equal(before)


@pytest.mark.parametrize(
    "name",
    ["BatchNormDropout", "LayerNormed", "GroupNormed", "Attention", "TiedWeights", "OneParameter", "Lazy", "Projected"],
)
def test_check_model_of_each_usual_kind_finds_nothing(name):
    config = Config(model=f"{networks.__file__}:{name}")
    assert check_model(lambda: build_model(config, SHAPE, CLASSES, [128.0], [64.0]), IMAGES, CLASSES, config) == []


def test_check_model_that_takes_one_size_is_refused_with_a_crop():
    with pytest.raises(UserError, match=r"^with --crop 1 --model mine.py:Net raised RuntimeError: mat1 and mat2"):
        check(Linear, crop=1)
    assert check(lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, CLASSES)), crop=1) == []


def test_check_model_with_batch_normalisation_in_parts_too_small_is_refused():
    with pytest.raises(UserError, match="--accumulate 6 leaves fewer than two of 10 images per microbatch"):
        check(
            lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, CLASSES)), batch_size=10, accumulate=6
        )
