"""TensorBoard: curves, histograms, pictures, the network's graph, and hyperparameters with the result."""

import re
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dist_mnist.config.settings import FIELDS
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.evaluation.checkpoints.result import Tested
from dist_mnist.model.classifier import Classifier
from dist_mnist.reporting.figures import confusion_picture, mistakes_picture
from dist_mnist.reporting.listener import Listener, RunEnd, RunStart, Validation
from dist_mnist.run.plan import Plan
from dist_mnist.run.records import EvaluationResult, MetricsRecord
from dist_mnist.utils.errors import short, warn

# Metric -> tag of its curve, with the unit, and the factor that converts to that unit.
CURVES = {
    "loss": ("loss/{}_nats", 1),
    "accuracy": ("accuracy/{}_percent", 100),
    "balanced_accuracy": ("accuracy/{}_balanced_percent", 100),
    "macro_f1": ("accuracy/{}_macro_F1_percent", 100),
    "auc": ("accuracy/{}_AUC", 1),
    "ece": ("calibration/{}_ECE_percent", 100),
    "brier": ("calibration/{}_Brier_score", 1),
    "calibrated_loss": ("calibration/{}_loss_at_best_temperature_nats", 1),
    "learning_rate": ("optimizer/learning_rate", 1),
    "gradient_norm": ("optimizer/gradient_norm", 1),
    "skipped_steps": ("optimizer/skipped_steps", 1),
    "images_per_s": ("speed/images_per_s", 1),
    "slowest_rank_ms_per_step": ("ranks/slowest_ms_per_step", 1),
    "median_rank_ms_per_step": ("ranks/median_ms_per_step", 1),
    "fastest_rank_ms_per_step": ("ranks/fastest_ms_per_step", 1),
    "waiting_for_data": ("share_of_a_step/waiting_for_data_percent", 100),
    "communicating": ("share_of_a_step/communicating_percent", 100),
    "memory_gb": ("memory/host_process_GB", 1),
    "device_memory_gb": ("memory/device_GB", 1),
}
# Curves that share a diagram on the page "Custom scalars".
TOGETHER = {
    "training and validation": {
        name: ["Multiline", [CURVES[name][0].format(kind) for kind in ("train", "validation")]]
        for name in ("loss", "accuracy")
    },
    "time": {
        "ranks": ["Multiline", [r"ranks/.*_ms_per_step"]],
        "share of a step": ["Multiline", [r"share_of_a_step/.*_percent"]],
    },
}
BINS = 60
HISTOGRAMS = 20  # per layer and run, at most


class Board(Listener):
    """Writes one event file for each start of a run; on resume, purges the points after the checkpoint."""

    def __init__(self, plan: Plan):
        self.plan, self.names = plan, plan.data.class_names
        self.histograms_at = 0
        self._writer: SummaryWriter | None = None

    def __str__(self) -> str:
        return "TensorBoard cannot be written"

    @property
    def writer(self) -> SummaryWriter:
        """The event file."""
        assert self._writer
        return self._writer

    def on_start(self, start: RunStart) -> None:
        """Open an event file."""
        folder, self.histograms_at = self.plan.run.tensorboard_path, start.step
        # TensorBoard reads event files in the order of their names, which begin with the second of their creation.
        while any(folder.glob(f"events.out.tfevents.{int(time.time()):010}.*")):
            time.sleep(0.05)
        self._writer = SummaryWriter(str(folder), purge_step=start.step + 1 if start.step else None)
        if not start.step:
            self.writer.add_custom_scalars(TOGETHER)

    def on_log(self, record: MetricsRecord) -> None:
        """Add a point to each curve."""
        self._curves(record.kind, record)

    def on_validation(self, validation: Validation) -> None:
        """Add points, the confusion matrix and, at most 20 times a run, histograms of weights and gradients."""
        step, total_steps = validation.record.step, self.plan.total_steps
        self._curves("validation", validation.record)
        self._confusion("validation", validation.evaluation.confusion.tolist(), step)
        if step >= min(self.histograms_at + total_steps / HISTOGRAMS, total_steps):
            self.histograms_at = step
            self._weights(validation.model, step)

    def on_end(self, end: RunEnd) -> None:
        """Add the test metrics, the figures of the test predictions, and the graph; close the file."""
        with closing(self.writer):
            if end.tested:
                self._result(end.tested)

    def _result(self, tested: Tested) -> None:
        result = tested.result
        self._curves("test", result)
        self._confusion("test", result.confusion_matrix, result.step)
        self._settings(result)
        if tested.probabilities is not None:
            self._predictions(tested.probabilities, tested.dataset, result.step)
            self._network(tested.model, tested.dataset.image_shape)

    def _curves(self, kind: str, record: MetricsRecord | EvaluationResult) -> None:
        """Add a point to each curve; `kind` is train, validation or test."""
        for name, (tag, factor) in CURVES.items():
            if (value := getattr(record, name, None)) is not None:
                self.writer.add_scalar(tag.format(kind), factor * value, record.step)
        self.writer.flush()  # before the checkpoint is saved, from which a killed run resumes

    def _weights(self, model: Classifier, step: int) -> None:
        """Add histograms of each layer's weights and gradients."""
        for name, parameter in model.inner.named_parameters():
            tag = name.replace(".", "/", 1)
            self._histogram(f"weights_{tag}", parameter.detach(), step)
            if parameter.grad is not None:
                self._histogram(f"gradients_{tag}", parameter.grad, step)

    def _confusion(self, split: str, matrix: Sequence[Sequence[int]], step: Any) -> None:
        """Add the confusion matrix as a picture."""
        self._picture(f"confusion/{split}", confusion_picture(matrix, self.names), step)

    def _predictions(self, probabilities: np.ndarray, dataset: IdxDataset, step: Any) -> None:
        """Add the worst mistakes and each class's precision-recall curve, from test probabilities (N, classes)."""
        if page := mistakes_picture(probabilities, dataset, self.names):
            self._picture("mistakes/test", page, step)
        labels = dataset.sample_labels
        for number, name in enumerate(self.names):
            tag = "" if name == str(number) else "_" + re.sub(r"[^\w.-]+", "_", name)[:40]
            self.writer.add_pr_curve(
                f"precision_recall/class_{number}{tag}", labels == number, probabilities[:, number], step
            )

    def _network(self, model: Classifier, image_shape: tuple[int, int, int]) -> None:
        """Add the network's graph."""
        image = torch.zeros(1, *image_shape, device=next(model.parameters()).device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # shapes become constants, as intended
            warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # torch's writer has no alternative yet
            try:
                self.writer.add_graph(model, image, use_strict_trace=False)
            except Exception as error:  # torch.jit cannot trace every module
                first = next(iter(str(error).strip().splitlines()), type(error).__name__)
                warn(f"TensorBoard has no graph of the network: torch.jit cannot trace it ({short(first, 200)})")

    def _settings(self, result: EvaluationResult) -> None:
        """Add hyperparameters and test metrics for the page "HParams", where runs can be sorted by both."""
        values = {
            name: ",".join(map(str, value)) if isinstance(value, list) else value
            for name, value in self.plan.config.to_json().items()
            if value is not None and not FIELDS[name].changeable
        }
        figures = {CURVES[of][0].format("test"): CURVES[of][1] * getattr(result, of) for of in ("accuracy", "loss")}
        _, *session = hparams(values, figures)  # TensorBoard infers the columns from all runs, or a sweep defines them
        for summary in session:
            self.writer._get_file_writer().add_summary(summary)

    def _picture(self, tag: str, picture: Any, step: int) -> None:
        self.writer.add_image(tag, np.array(picture), step, dataformats="HWC")

    def _histogram(self, tag: str, values: torch.Tensor, step: int) -> None:
        """Add a histogram with equal-width bins, a hundred times as fast as the writer's own."""
        values = values.float()
        low, high = values.aminmax()
        if not (low.isfinite() and high.isfinite()):
            return
        edges = np.linspace(float(low), float(high) if high > low else float(low) + 1e-12, BINS + 1)
        counts = torch.histc(values, BINS, float(low), float(high))
        self.writer.add_histogram_raw(
            tag, float(low), float(high), values.numel(), float(values.sum()), float(values.square().sum()),
            edges[1:].tolist(), counts.tolist(), step,
        )  # fmt: skip
