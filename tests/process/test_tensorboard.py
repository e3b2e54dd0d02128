"""What TensorBoard shows of real runs, read back from their event files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard._pytorch_graph import GraphDef  # what the writer itself uses

from helpers import HANGS_AFTER_S
from helpers.runs import SMALL, end, records, start, train_here, wait_for

pytestmark = pytest.mark.xdist_group("board")  # what several of these need is made once

ALWAYS = {
    "loss/train_nats", "loss/validation_nats", "loss/test_nats", "accuracy/train_percent",
    "accuracy/validation_percent", "accuracy/test_percent", "optimizer/learning_rate", "optimizer/gradient_norm",
    "optimizer/skipped_steps", "speed/images_per_s", "share_of_a_step/waiting_for_data_percent",
    "memory/host_process_GB", "accuracy/test_balanced_percent", "accuracy/test_macro_F1_percent", "accuracy/test_AUC",
    "calibration/test_ECE_percent", "calibration/test_Brier_score", "calibration/test_loss_at_best_temperature_nats",
}  # fmt: skip
OF_RANKS = {
    "ranks/slowest_ms_per_step", "ranks/median_ms_per_step", "ranks/fastest_ms_per_step",
    "share_of_a_step/communicating_percent",
}  # fmt: skip
OPTIONS = [option for option in SMALL if option != "--no-tensorboard"]


def command(digits: Path, run_dir: Path, *options: str, nproc: int = 1) -> list[str]:
    own = (f"--nproc={nproc}", "--max-restarts=0", f"--data-dir={digits}", f"--run-dir={run_dir}", "--log-every=1")
    return [sys.executable, "-m", "dist_mnist", "train", *own, *OPTIONS, *options]


def train(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*words, **more), capture_output=True, text=True, timeout=HANGS_AFTER_S)
    assert done.returncode == 0, done.stderr
    return done


def events(run_dir: Path) -> EventAccumulator:
    everything = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance=everything).Reload()


@pytest.fixture(scope="module")
def two_ranks(digits, tmp_path_factory) -> Path:
    """A finished run of two processes over two epochs of 11 steps."""
    path = tmp_path_factory.mktemp("runs") / "two"
    assert not train(digits, path, "--epochs=2", nproc=2).stderr
    return path


@pytest.fixture(scope="module")
def shown(two_ranks) -> EventAccumulator:
    return events(two_ranks)


def test_curves_of_two_ranks_have_units_and_are_the_metrics(two_ranks, shown):
    assert set(shown.Tags()["scalars"]) == ALWAYS | OF_RANKS
    curves = {tag: {event.step: event.value for event in shown.Scalars(tag)} for tag in shown.Tags()["scalars"]}
    for record in records(two_ranks, "train"):
        step = record["step"]
        assert curves["loss/train_nats"][step] == pytest.approx(record["loss"])
        assert curves["accuracy/train_percent"][step] == pytest.approx(100 * record["accuracy"])
        assert curves["speed/images_per_s"][step] == pytest.approx(record["images_per_s"])
        slowest, median, fastest = (
            curves[f"ranks/{name}_ms_per_step"][step] for name in ("slowest", "median", "fastest")
        )
        assert slowest >= median >= fastest > 0
        assert 0 <= curves["share_of_a_step/waiting_for_data_percent"][step] < 100
        assert 0 < curves["share_of_a_step/communicating_percent"][step] < 100
        assert 0.05 < curves["memory/host_process_GB"][step] < 20
    assert list(curves["loss/train_nats"]) == list(range(1, 23))
    assert list(curves["loss/validation_nats"]) == [11, 22]
    result = json.loads((two_ranks / "result.json").read_text())
    assert curves["accuracy/test_percent"] == {result["step"]: pytest.approx(100 * result["accuracy"])}


def test_layout_of_curves_puts_validation_over_training(shown):
    [tensor] = shown.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert charts == {
        "loss": ["loss/train_nats", "loss/validation_nats"],
        "accuracy": ["accuracy/train_percent", "accuracy/validation_percent"],
    }


def test_pictures_of_a_run_are_drawn(two_ranks, shown, tmp_path):
    assert set(shown.Tags()["images"]) == {"confusion/validation", "confusion/test", "mistakes/test"}
    assert [event.step for event in shown.Images("confusion/validation")] == [11, 22]
    for tag in shown.Tags()["images"]:
        (tmp_path / "picture.png").write_bytes(shown.Images(tag)[-1].encoded_image_string)
        picture = np.asarray(Image.open(tmp_path / "picture.png"))
        assert picture.shape[0] > 200 and picture.shape[1] > 200 and picture.std() > 10


def test_histograms_and_precision_and_recall_are_those_of_the_network(two_ranks, shown):
    names = {"stages/0.0.weight", "dense/0.0.weight", "head/weight", "head/bias"}
    assert {f"{what}_{name}" for what in ("weights", "gradients") for name in names} <= set(shown.Tags()["histograms"])
    [first, second] = shown.Histograms("weights_head/weight")
    assert (first.step, second.step) == (11, 22) and first.histogram_value.num == 16 * 10
    assert sum(second.histogram_value.bucket) == 16 * 10
    curves = {tag for tag in shown.Tags()["tensors"] if tag.startswith("precision_recall/")}
    assert curves == {f"precision_recall/class_{number}" for number in range(10)}
    [event] = shown.Tensors("precision_recall/class_3")
    rows = np.frombuffer(event.tensor_proto.tensor_content, np.float32).reshape(6, -1) if (
        event.tensor_proto.tensor_content
    ) else np.array(event.tensor_proto.float_val).reshape(6, -1)  # fmt: skip
    true_positives, false_positives = rows[:2]
    matrix = np.array(json.loads((two_ranks / "result.json").read_text())["confusion_matrix"])
    assert true_positives[0] == matrix[3].sum() and true_positives[0] + false_positives[0] == 200


def test_graph_of_the_network_has_its_convolutions(shown):
    graph = GraphDef.FromString(shown.Graph().SerializeToString())
    assert any("Conv2d" in node.name for node in graph.node)


def test_settings_of_a_run_are_beside_its_results(two_ranks, shown):
    found = {}
    for tag, content in shown.summary_metadata.items():
        if content.plugin_data.plugin_name == "hparams":
            found[tag] = plugin_data_pb2.HParamsPluginData.FromString(content.plugin_data.content)
    started = found["_hparams_/session_start_info"].session_start_info.hparams
    assert started["lr"].number_value == 0.1 and started["conv_channels"].string_value == "4,4"
    assert "checkpoint_every" not in started  # does not change what is computed
    assert "_hparams_/experiment" not in found, "of several runs TensorBoard would take any one's columns for all"


def test_curves_of_a_killed_run_have_no_overlap_and_no_gap(digits, tmp_path):
    run_dir, metrics = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    longer = ("--checkpoint-every=20", "--schedule=constant", "--warmup-fraction=0")
    running = start(*command(digits, run_dir, *longer, "--steps=1000000"))
    try:
        wait_for(lambda: metrics.exists() and len(records(run_dir, "train")) >= 50, running)
    finally:
        end(running)
    steps = records(run_dir, "train")[-1]["step"] + 10
    done = train_here(digits, run_dir, *OPTIONS, "--tensorboard", "--log-every=1", *longer, f"--steps={steps}")
    assert done.returncode == 0 and "resume    after step" in done.stdout, done.stderr
    curves = events(run_dir)
    for tag in ("loss/train_nats", "optimizer/learning_rate"):
        assert [event.step for event in curves.Scalars(tag)] == list(range(1, steps + 1))
    assert len(curves.Scalars("accuracy/test_percent")) == 1


def test_training_where_tensorboard_cannot_be_written_goes_on(digits, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").write_text("not a folder")
    done = train_here(digits, tmp_path / "run", *OPTIONS, "--tensorboard", "--steps=3")
    assert done.returncode == 0, done.stderr
    [warning] = done.stderr.splitlines()
    assert "TensorBoard cannot be written" in warning and "training goes on without it" in warning
    assert (tmp_path / "run/result.json").exists()
