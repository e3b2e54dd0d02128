"""Evaluation: every sample counted once, against a loop in plain Python; checkpoints against their networks."""

import math

import numpy as np
import pytest
import torch
from msgspec.structs import asdict, replace

from dist_mnist.config.settings import Config
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.loader import Batch, keep_on_device
from dist_mnist.data.splits import open_data
from dist_mnist.evaluation import metrics
from dist_mnist.evaluation.checkpoints.result import evaluate_checkpoints
from dist_mnist.evaluation.choices import Split
from dist_mnist.evaluation.evaluate import Evaluation, evaluate, predict
from dist_mnist.model.build import build_model
from dist_mnist.reporting.text import figures_lines, result_line
from dist_mnist.run.checkpoints.file import CheckpointError, save_checkpoint
from dist_mnist.run.records import DataFacts, EvaluationResult
from dist_mnist.training.trainer import Trainer
from dist_mnist.utils.errors import UserError
from helpers.checkpoints import INFO

SMALL = {"conv_channels": (2, 3), "dense_units": (8,), "kernel_size": 3, "precision": "fp32"}


def dataset(count: int, classes: int = 4) -> IdxDataset:
    rng = np.random.default_rng(count)
    images, labels = rng.integers(0, 256, (count, 3, 3), np.uint8), rng.integers(0, classes, count).astype(np.uint8)
    return IdxDataset(images, labels)


def linear(seed: int, classes: int = 4):
    weights = torch.randn(9, classes, generator=torch.Generator().manual_seed(seed))
    return lambda images: images.float().flatten(1) / 255 @ weights


@pytest.mark.parametrize("count", [1, 499, 500, 501, 1203])
@pytest.mark.parametrize("way", ["no", "yes"], ids=["host", "resident"])
@pytest.mark.parametrize("networks", [[linear(0)], [linear(0), linear(1), linear(2)]], ids=["one", "three"])
def test_evaluate_any_count_equals_a_plain_loop(alone, count, way, networks):
    data, confusion, loss = dataset(count), [[0] * 4 for _ in range(4)], 0.0
    for i in range(count):
        image, label = data[i]
        logits = [network(torch.from_numpy(image[None, ..., 0]))[0].double() for network in networks]
        mean = [
            sum(column) / len(networks) for column in zip(*(one.softmax(0).tolist() for one in logits), strict=True)
        ]
        confusion[label][mean.index(max(mean))] += 1
        loss -= math.log(mean[label])
    found = evaluate(networks, data, 4, alone, keep_on_device(way, data, alone.device))
    assert found.confusion.tolist() == confusion
    assert found.images == count and found.correct == sum(confusion[i][i] for i in range(4))
    assert found.accuracy == found.correct / count
    assert found.loss == pytest.approx(loss / count, rel=1e-5)


@pytest.mark.parametrize("count", [1, 500, 1203])
def test_evaluate_any_count_uses_every_sample_once(alone, count):
    images = np.arange(count, dtype=np.int32).reshape(-1, 1, 1)
    seen = []

    def network(batch):
        seen.extend(batch.flatten().tolist())
        return torch.zeros(len(batch), 2)

    evaluate(network, IdxDataset(images, np.zeros(count, np.uint8)), 2, alone)
    assert sorted(seen) == list(range(count))


def test_evaluation_class_without_images_has_no_accuracy(alone):
    found = evaluate(linear(0), dataset(50, classes=3), 4, alone)  # no image of class 3
    assert found.per_class_accuracy[3] is None
    for label, row in enumerate(found.confusion.tolist()[:3]):
        assert found.per_class_accuracy[label] == row[label] / sum(row)


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
@pytest.mark.parametrize("batch_norm", ["none", "dense", "all"])
def test_evaluate_between_steps_equals_the_saved_network(alone, small_set, batch_norm, ema_decay):
    """In evaluation mode, and without a trace: a checkpoint's figures are those that eval gives again."""
    data = open_data(small_set, 0, 0)
    config = Config(**SMALL, batch_norm=batch_norm, ema_decay=ema_decay)
    trainer = Trainer(config, alone, build_model(config, (1, 4, 5), 3, [128.0], [70.0]), 10)
    images = torch.from_numpy(np.array(data.train.images)).permute(0, 3, 1, 2)
    batch = Batch(images, torch.arange(20) % 3, torch.arange(20))
    for step in range(3):
        trainer.step(batch, step, 0, 20)
    state = {name: array.copy() for name, array in trainer.state_arrays().items()}
    with trainer.evaluation_model() as network:
        during = evaluate(network, data.test, 3, alone)
    for name, array in trainer.state_arrays().items():
        np.testing.assert_array_equal(array, state[name], err_msg=f"evaluation changed {name}")
    model = build_model(config, (1, 4, 5), 3).eval()
    weights = {n.split("/", 1)[1]: torch.from_numpy(a) for n, a in state.items() if n.startswith("model/")}
    weights |= {n.split("/", 1)[1]: torch.from_numpy(a) for n, a in state.items() if n.startswith("average/")}
    model.load_state_dict(weights)
    afterwards = evaluate(model, data.test, 3, alone)
    assert during.confusion.equal(afterwards.confusion) and during.loss == pytest.approx(afterwards.loss, rel=1e-5)
    trainer.step(batch, 3, 0, 20)  # and training goes on as training
    assert batch_norm == "none" or not np.array_equal(
        trainer.state_arrays()["model/dense.0.1.running_mean"], state["model/dense.0.1.running_mean"]
    )


@pytest.fixture
def write_checkpoint(small_set, tmp_path):
    """A function that writes a checkpoint of a network trained (as it says) on the small set; path and network."""

    def write(name="one", shape=(1, 4, 5), average=False, **options):
        config = Config(**{**SMALL, "batch_norm": "none", "validation_fraction": 0.2, **options})
        data = open_data(small_set, config.validation_fraction, config.split_seed)
        model = build_model(config, shape, 3, [128.0], [70.0]).eval()
        other = build_model(Config(**SMALL, batch_norm="none", seed=99), shape, 3, [128.0], [70.0]).eval()
        arrays = {f"model/{name}": np.ascontiguousarray(value) for name, value in model.state_dict().items()}
        if average:
            arrays |= {f"average/{name}": np.ascontiguousarray(value) for name, value in other.state_dict().items()}
        facts = DataFacts(folder=str(small_set), fingerprint=data.fingerprint, image_shape=shape, num_classes=3)
        info = replace(INFO, step=7, settings=config.to_json(), data=facts)
        path = tmp_path / f"{name}.safetensors"
        save_checkpoint(path, arrays, info)
        return path, other if average else model

    return write


def figures(result: EvaluationResult) -> tuple:
    """What an evaluation counts, of a record."""
    names = ("images", "correct", "accuracy", "loss", "per_class_accuracy", "confusion_matrix")
    return tuple(getattr(result, name) for name in names)


def figures_of(evaluation: Evaluation) -> tuple:
    """The same of what was counted."""
    matrix = tuple(map(tuple, evaluation.confusion.tolist()))
    counts = evaluation.images, evaluation.correct, evaluation.accuracy, evaluation.loss
    return *counts, tuple(evaluation.per_class_accuracy), matrix


@pytest.mark.parametrize("split", [Split.TEST, Split.VALIDATION, Split.TRAIN])
@pytest.mark.parametrize("average", [False, True])
def test_evaluate_checkpoints_single_equals_its_network(alone, small_set, write_checkpoint, split, average):
    path, model = write_checkpoint(average=average, seed=3)
    result = evaluate_checkpoints([path], split, None, alone)
    expected = evaluate(model.eval(), getattr(open_data(small_set, 0.2, 3), split), 3, alone)
    assert (result.split, result.checkpoints, result.step, result.views) == (split, (path.name,), 7, 1)
    assert result.parameters == model.num_parameters() and figures(result) == figures_of(expected)


def test_evaluate_checkpoints_figures_are_those_of_the_logits_and_the_temperature_of_validation_alone(
    alone, small_set, write_checkpoint, write_set, tmp_path
):
    path, model = write_checkpoint(seed=3)  # whose six test images have a best temperature of their own
    data = open_data(small_set, 0.2, 3)
    on_validation, on_test = (
        evaluate(model, split, 3, alone, keep_logits=True).logits.numpy() for split in (data.validation, data.test)
    )
    temperature = metrics.best_temperature(on_validation, data.validation.sample_labels)
    assert temperature and temperature != metrics.best_temperature(on_test, data.test.sample_labels)
    found = evaluate_checkpoints([path], Split.TEST, None, alone)
    expected = metrics.figures_of(on_test, data.test.sample_labels, temperature)
    assert {name: getattr(found, name) for name in expected.__struct_fields__} == asdict(expected)
    assert any(f"at temperature {temperature:.3f}" in line for line in figures_lines(found))
    labels = (np.arange(20, dtype=np.uint8) % 3)[::-1]
    other = write_set(np.array(data.train.images), labels, folder=tmp_path / "other")
    whole, _ = write_checkpoint("whole", validation_fraction=0.0)
    for checkpoint, split, folder in (
        (whole, Split.TEST, None),
        (path, Split.VALIDATION, None),
        (path, Split.TRAIN, None),
        (path, Split.TEST, other),
    ):
        without = evaluate_checkpoints([checkpoint], split, folder, alone)
        assert (without.temperature, without.calibrated_loss) == (None, None) and without.brier > 0
        expected = "no best temperature (fitting it needs mistakes on validation images)"
        assert any(expected in line for line in figures_lines(without))


def test_evaluate_checkpoints_last_images_as_validation_split(alone, small_set, write_checkpoint):
    path, model = write_checkpoint(validation_split="last", seed=3)
    expected = evaluate(model.eval(), open_data(small_set, 0.2, None).validation, 3, alone)
    assert figures(evaluate_checkpoints([path], Split.VALIDATION, None, alone)) == figures_of(expected)
    drawn, _ = write_checkpoint("drawn", seed=3)
    for paths in ([path, drawn], [drawn, path]):
        with pytest.raises(UserError, match=f"{paths[1]}: .*the settings of the split differ"):
            evaluate_checkpoints(paths, Split.VALIDATION, None, alone)


def test_evaluate_checkpoints_views_override_those_of_the_run(alone, small_set, write_checkpoint):
    """As many as its run was told, or as are asked for."""
    (one, _), (several, model) = write_checkpoint(), write_checkpoint("several", views=5)
    expected = figures_of(evaluate(model, open_data(small_set, 0, 0).test, 3, alone))
    for path, views in ((several, None), (several, 5), (one, 5)):
        found = evaluate_checkpoints([path], Split.TEST, None, alone, views=views)
        assert figures(found) == expected and found.views == 5
        assert "images, TTA over 5 views), loss" in result_line(found)
    assert evaluate_checkpoints([several, one], Split.TEST, None, alone).views == (5, 1)
    assert evaluate_checkpoints([several], Split.TEST, None, alone, views=1).loss != expected[3]
    still, _ = write_checkpoint("still", rotate=0, scale=0, shift=0)
    for path, views, why in ((one, 4, "must be odd"), (still, 3, "but --rotate, ")):
        with pytest.raises(UserError, match=f"{path}: .*{why}"):
            evaluate_checkpoints([path], Split.TEST, None, alone, views=views)


def test_predict_keeps_the_order_of_the_samples(alone, small_set, write_checkpoint):
    (_, first), (_, second) = write_checkpoint("one"), write_checkpoint("two", pixels="standard")
    dataset = open_data(small_set, 0.2, 3).train
    images = torch.from_numpy(dataset.__getitems__(range(len(dataset))).images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits = [network.eval()(images) for network in (first, second)]
    assert torch.allclose(predict([first], dataset, alone), logits[0].double().softmax(1))
    both = sum(each.double().softmax(1) for each in logits) / 2
    assert torch.allclose(predict([first, second], dataset, alone), both)


def test_evaluate_checkpoints_several_are_averaged(alone, small_set, write_checkpoint):
    (one, first), (two, second) = write_checkpoint("one"), write_checkpoint("two", pixels="standard", seed=0, lr=0.5)
    (three, third) = write_checkpoint("three", average=True)
    result = evaluate_checkpoints([one, two, three], Split.TEST, None, alone)
    expected = evaluate([first, second, third], open_data(small_set, 0, 0).test, 3, alone)
    assert result.step == (7, 7, 7) and figures(result)[5] == figures_of(expected)[5]
    assert result.loss == pytest.approx(expected.loss)


def test_evaluate_checkpoints_unfit_data_is_refused(alone, write_set, write_checkpoint, tmp_path):
    path, _ = write_checkpoint()
    rng = np.random.default_rng(5)
    labels = np.arange(12, dtype=np.uint8)
    wider = write_set(rng.integers(0, 256, (12, 4, 6), np.uint8), labels % 3, folder=tmp_path / "wider")
    more = write_set(rng.integers(0, 256, (12, 4, 5), np.uint8), labels % 4, folder=tmp_path / "more")
    other = write_set(rng.integers(0, 256, (12, 4, 5), np.uint8), labels % 3, folder=tmp_path / "other")
    whole, _ = write_checkpoint("whole", validation_fraction=0.0)
    assert evaluate_checkpoints([path], Split.TEST, other, alone).images == 12
    for paths, split, folder, message in (
        ([path], Split.TEST, wider, r"trained on images of \[1, 4, 5\]"),
        ([path], Split.TEST, more, "in 3 classes, but .* in 4"),
        ([path], Split.TRAIN, other, "give --split test"),
        ([path, write_checkpoint("seed", seed=1)[0]], Split.VALIDATION, None, "give --split test"),
        ([whole], Split.VALIDATION, None, "without a validation split"),
        ([tmp_path / "absent"], Split.TEST, None, "no such checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_checkpoints(paths, split, folder, alone)
    with pytest.raises(CheckpointError, match="its weights do not match its settings"):
        evaluate_checkpoints([write_checkpoint("odd", dense_units=(9,), average=True)[0]], Split.TEST, None, alone)
