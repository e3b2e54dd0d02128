"""Records of a run's files: what versions before wrote is read, and written again it is the same JSON."""

import json

import pytest

from dist_mnist.run.records import CheckpointInfo, EvaluationResult, MetricsRecord, RunConfig, RunResult, read_run
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.files import to_json
from dist_mnist.utils.schema import parse

DATA = {"folder": "/d/ü", "fingerprint": "ab" * 32, "image_shape": [1, 28, 28], "num_classes": 3}
SETTINGS = {"recipe": "default", "seed": 0, "lr": 0.1, "optimizer": "sgd", "conv_channels": [32, 64], "steps": None}
VERSIONS = {"python": "3.11.7", "dist-mnist": "0.1.0", "numpy": "2.4.6", "torch": "2.13.0"}
NEW = (
    "balanced_accuracy", "macro_f1", "top_k", "top_k_accuracy", "auc", "brier", "ece", "temperature", "calibrated_loss",
)  # fmt: skip
FILES = {
    "a checkpoint within an epoch": (CheckpointInfo, {
        "settings": SETTINGS, "data": DATA, "step": 7, "epoch": 0.5, "validation": {"accuracy": 0.25, "loss": None},
        "versions": VERSIONS, "ledger": [9, -(2**63), 2**63 - 1, 0], "meter": [None, 3.0, 250.0],
        "early_stopping": {"training_s": 1.5, "best_accuracy": 0.25, "validations_since_best": 2},
        "code_sha256": "ab" * 32, "init": {"path": "other", "sha256": "cd" * 32},
        "computed_by": {"device": "cpu", "processes": 2, "threads": 1}, "parent": "ef" * 32,
        "settings_sha256": "01" * 32, "arrays_sha256": "23" * 32,
    }),
    "a checkpoint without validation": (CheckpointInfo, {
        "settings": SETTINGS, "data": DATA, "step": 0, "epoch": 0.0, "validation": None, "versions": VERSIONS,
        "ledger": [0, 0, 0, 0], "meter": [0.0, 0.0, 0.0],
        "early_stopping": {"training_s": 0.0, "best_accuracy": None, "validations_since_best": 0},
        "code_sha256": None, "init": None,
        "computed_by": None, "parent": None, "settings_sha256": None, "arrays_sha256": None,
    }),
    "config.json": (RunConfig, {
        "settings": SETTINGS, "data": DATA, "versions": VERSIONS,
        "machine": {"host": "h", "system": "Linux", "device": "cpu", "cores": 2, "processes": 1},
        "code_sha256": None, "init": None,
    }),
    "metrics of one process": (MetricsRecord, {
        "kind": "train", "step": 10, "epoch": 0.5, "loss": 1.5, "accuracy": 0.5, "learning_rate": 0.05,
        "gradient_norm": 2.25, "skipped_steps": 0, "images_per_s": 1234.5, "waiting_for_data": 0.125,
        "memory_gb": 0.75, "elapsed_s": 1.5,
    }),
    "metrics of two processes": (MetricsRecord, {
        "kind": "train", "step": 10, "epoch": 0.5, "loss": 1.5, "accuracy": 0.5, "learning_rate": 0.05,
        "gradient_norm": 2.25, "skipped_steps": 1, "images_per_s": 1234.5, "waiting_for_data": 0.125,
        "memory_gb": 0.75, "communicating": 0.25, "slowest_rank_ms_per_step": 2.5, "median_rank_ms_per_step": 2.0,
        "fastest_rank_ms_per_step": 1.5, "elapsed_s": 1.5,
    }),
    "metrics of a validation": (MetricsRecord, {
        "kind": "validation", "step": 10, "loss": 1.5, "accuracy": 0.5, "elapsed_s": 2.5,
    }),
    "result.json": (RunResult, {
        "split": "test", "checkpoints": ["step-00000010.safetensors"], "checkpoint_sha256": ["ab" * 32], "step": 10,
        "views": 1, "parameters": 99,
        "images": 4, "correct": 3, "accuracy": 0.75, "loss": 0.5, "balanced_accuracy": 0.75, "macro_f1": 0.75,
        "top_k": 2, "top_k_accuracy": 1.0, "auc": 0.875, "brier": 1.5, "ece": 0.25, "temperature": 1.25,
        "calibrated_loss": 0.375, "per_class_accuracy": [1.0, 0.5, None],
        "confusion_matrix": [[2, 0, 0], [1, 1, 0], [0, 0, 0]],
        "reliability": [{"images": 0, "confidence": None, "accuracy": None},
                        {"images": 4, "confidence": 0.5, "accuracy": 0.75}],
        "class_names": ["a", "b", "猫"], "held_out": 0.25,
        "seconds": {"training": 1.5, "training_with_evaluation": 2.0, "since_start": 4.25},
        "ended": "patience",
    }),
    "the result of several checkpoints": (EvaluationResult, {
        "split": "test", "checkpoints": ["a", "b"], "checkpoint_sha256": ["ab" * 32, "cd" * 32], "step": [10, 20],
        "views": [1, 5], "parameters": 99,
        "images": 1, "correct": 1, "accuracy": 1.0, "loss": 0.5, **dict.fromkeys(NEW),
        "per_class_accuracy": [1.0],
        "confusion_matrix": [[1]], "reliability": None, "class_names": None, "held_out": None,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_record_read_and_written_is_the_same_text(name):
    kind, content = FILES[name]
    text = json.dumps(content)
    record = parse(text, kind)
    assert to_json(record) == text
    with pytest.raises(AttributeError):
        record.step = 5


@pytest.mark.parametrize(("change", "sentence"), [
    ({"images": 5}, "its confusion matrix does not match its numbers of images"),
    ({"correct": 2}, "its confusion matrix does not match its numbers of images"),
    ({"confusion_matrix": [[3]]}, "does not have a row and a column for each class"),
    ({"confusion_matrix": [[2, 0, 0], [1, 1], [0, 0, 0]]}, "does not have a row and a column for each class"),
    ({"confusion_matrix": []}, "does not have a row and a column for each class"),
    ({"per_class_accuracy": [1.0]}, "does not have a row and a column for each class"),
    ({"confusion_matrix": [[2, 0, 0], [1, 1, 0], [0, 0, -1]]}, ">= 0"),
    ({"class_names": ["a", "b"]}, "the numbers of its class names and classes differ"),
    ({"accuracy": 2}, "<= 1.0"),
])  # fmt: skip
def test_read_run_inconsistent_result_is_refused(tmp_path, change, sentence):
    (tmp_path / "config.json").write_text(json.dumps(FILES["config.json"][1]))
    (tmp_path / "result.json").write_text(json.dumps(FILES["result.json"][1] | change))
    with pytest.raises(UserError, match=f"{tmp_path / 'result.json'} cannot be read.*{sentence}"):
        read_run(tmp_path)


def test_read_run_result_from_before_it_had_seconds_and_other_figures_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FILES["config.json"][1]))
    later = ("seconds", "reliability", *NEW)
    old = {key: value for key, value in FILES["result.json"][1].items() if key not in (*later, "ended")}
    (tmp_path / "result.json").write_text(json.dumps(old))
    assert read_run(tmp_path).result.accuracy == 0.75 and read_run(tmp_path).result.seconds is None
    assert all(getattr(read_run(tmp_path).result, name) is None for name in later)
    assert read_run(tmp_path).result.ended == "length"


@pytest.mark.parametrize("name", ["recipe", "optimizer"])
def test_read_run_settings_without_a_name_are_refused(tmp_path, name):
    config = FILES["config.json"][1]
    (tmp_path / "config.json").write_text(json.dumps(config | {"settings": SETTINGS | {name: 5}}))
    with pytest.raises(UserError, match=f"its settings lack the name of the {name}"):
        read_run(tmp_path)


def test_read_run_resumed_run_sums_its_starts_and_drops_a_cut_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FILES["config.json"][1] | {"machine": None}))
    record = FILES["metrics of one process"][1]
    lines = [record | {"elapsed_s": elapsed, "images_per_s": speed} for elapsed, speed in ((1, 10), (5, None), (2, 30))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    run = read_run(tmp_path)
    assert (run.training_s, run.median("images_per_s"), run.result, run.config.machine) == (7, 20, None, None)
