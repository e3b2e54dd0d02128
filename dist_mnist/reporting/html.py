"""HTML report of one run or several, a self-contained page, for `dist-mnist report`."""

import base64
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, PackageLoader
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from msgspec.structs import asdict
from PIL import Image

from dist_mnist.config.overrides import as_options
from dist_mnist.config.resolve import as_given, resolve
from dist_mnist.config.settings import FIELDS
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.distributed.world import World
from dist_mnist.evaluation.checkpoints.result import predict_test
from dist_mnist.reporting.compare import PredictTest, compare, compare_pair
from dist_mnist.reporting.figures import STYLE, confusion_picture, mistakes_picture, reliability_diagram
from dist_mnist.reporting.text import (
    class_label,
    clock,
    comparison_sentence,
    confused_with,
    figure,
    listed,
    setting_text,
)
from dist_mnist.run.records import EvaluationResult, ReliabilityBin, RunSummary
from dist_mnist.utils.errors import UserError, as_utf8, os_error_as
from dist_mnist.utils.files import atomic_write


class Diagram(NamedTuple):
    """A metric of `metrics.jsonl` and how it is drawn."""

    heading: str
    metric: str
    factor: float = 1
    scale: str = "linear"


DIAGRAMS = (
    Diagram("loss, nats", "loss", scale="log"),
    Diagram("error rate, %", "wrong", 100, "log"),
    Diagram("learning rate", "learning_rate"),
    Diagram("speed, images/s", "images_per_s"),
)
KINDS: Mapping[str, Any] = {  # kinds of records, and matplotlib's line properties
    "train": {"lw": 0.9, "alpha": 0.6},
    "validation": {"lw": 1.8, "marker": ".", "ms": 5},
}


class FigureRow(NamedTuple):
    """A test metric: its name, formatted value and meaning."""

    name: str
    value: str
    meaning: str


FIGURES = (
    ("balanced accuracy", "balanced_accuracy", ".2%", "recall, averaged over classes"),
    ("macro F1", "macro_f1", ".2%", "F1 (of precision and recall), averaged over classes"),
    ("top-{} accuracy", "top_k_accuracy", ".2%", "fraction of images whose class is among the {} most probable"),
    ("AUC", "auc", ".5f", "area under the ROC curve of each class against the rest, averaged over classes"),
    ("expected calibration error", "ece", ".2%", "average gap of confidence and accuracy over 15 equal-width bins"),
    ("Brier score", "brier", ".4f", "average squared distance of the probabilities from the label, 0 to 2"),
    ("loss", "loss", ".4f", "negative log-likelihood of the labels, nats"),
    ("best temperature", "temperature", ".3f", "divisor of the logits for the least validation loss; below 1: "
     "the network is underconfident"),
    ("loss at best temperature", "calibrated_loss", ".4f", "negative log-likelihood of the labels, nats"),
)  # fmt: skip


class ClassRow(NamedTuple):
    """A class of the test set; `confused_with` lists the classes it was most often mistaken for."""

    name: str
    images: int
    recall: float | None
    precision: float | None
    confused_with: str


class SettingRow(NamedTuple):
    """A setting; `changed` if it differs from the default recipe."""

    name: str
    value: str
    changed: bool
    help: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A run's section of the page; pictures are data URIs."""

    name: str
    step: int  # of the last record
    result: EvaluationResult | None
    figures: Sequence[FigureRow]
    classes: Sequence[ClassRow]
    confusion: str | None
    reliability: str | None
    mistakes: str | None
    why_no_mistakes: str | None
    settings: Sequence[SettingRow]
    environment: Mapping[str, str]
    speed: Mapping[str, str]
    command: str


def write_page(
    runs: Sequence[RunSummary],
    path: Path,
    data_dir: Path | None,
    world: World,
    code: Sequence[str] = (),
    test_fraction: float | None = None,
    predict: PredictTest | None = None,
) -> None:
    """Write the report of some runs to `path`.

    Args:
        data_dir: folder of the test images; None for the folder that each run was trained on. If they or a run's
            checkpoints are missing, the page says so instead of showing the worst mistakes.
        code: the user's own networks, as for `evaluation.checkpoints.load.load_models`.
        test_fraction: as for `evaluation.checkpoints.split.open_split`.
        predict: returns the test predictions of the run at a path; None to compute them.

    Raises:
        UserError: the page cannot be written.
    """

    @cache
    def predicted(path: Path) -> tuple[torch.Tensor, IdxDataset]:
        return predict(path) if predict else predict_test(path, data_dir, world, code, test_fraction)

    template = Environment(loader=PackageLoader("dist_mnist.reporting", "."), autoescape=True, trim_blocks=True)
    template.filters |= {"figure": figure, "clock": clock, "listed": listed}
    page = template.get_template("page.html").render(
        title=", ".join(as_utf8(run.path.resolve().name) for run in runs[:4]) + (" …" if len(runs) > 4 else ""),
        rows=compare(runs),
        comparison=comparison_sentence(found) if (found := compare_pair(runs, predicted)) else None,
        diagrams=[(diagram.heading, _draw(runs, diagram)) for diagram in DIAGRAMS],
        runs=[_section(run, predicted) for run in runs],
    )
    with os_error_as(f"{path}: the page cannot be written"), atomic_write(path) as file:
        file.write(page.encode(errors="replace"))


def _draw(runs: Sequence[RunSummary], diagram: Diagram) -> str:
    """Draw one metric of all runs, training thin, validation bold; return an SVG image as a data URI."""
    file = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.add_subplot(xlabel="epoch", yscale=diagram.scale)
        for number, run in enumerate(runs):
            for kind, look in KINDS.items():
                if points := _points(run, kind, diagram.metric):
                    epochs, values = np.transpose(points)
                    axes.plot(epochs, diagram.factor * values, color=f"C{number % 10}", label=kind, **look)
        axes.set_xlim(left=0)
        if diagram.scale == "linear":
            axes.set_ylim(bottom=0)
        else:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        if len(runs) == 1 and len(axes.lines) > 1:
            axes.legend(frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _uri("svg+xml", file.getvalue())


def _points(run: RunSummary, kind: str, metric: str) -> list[tuple[float, float]]:
    """Return epochs and values of a metric where it is known, and positive on a logarithmic axis."""
    per_step = next((record.epoch / record.step for record in run.records if record.epoch), 1.0)
    found = []
    for record in run.records:
        if record.kind == kind:
            value = record.error_rate if metric == "wrong" else getattr(record, metric)
            if value is not None and (value > 0 or metric == "learning_rate"):
                found.append((record.step * per_step, value))
    return found


def _section(run: RunSummary, predict_test: PredictTest) -> Section:
    mistakes, why_no_mistakes = None, None
    result = run.result
    names = (result.class_names if result else None) or run.config.data.names
    if result:
        try:
            mistakes = _mistakes(*predict_test(run.path), names)
        except UserError as error:
            why_no_mistakes = str(error)
    return Section(
        name=as_utf8(run.path.resolve().name),
        step=run.records[-1].step if run.records else 0,
        result=result,
        figures=_figures(result) if result else [],
        classes=_classes(result.confusion_matrix, names) if result else [],
        confusion=_picture(confusion_picture(result.confusion_matrix, names)) if result else None,
        reliability=_reliability(result.reliability) if result and result.reliability else None,
        mistakes=mistakes,
        why_no_mistakes=why_no_mistakes,
        settings=_settings(run),
        environment=_environment(run),
        speed=_speed(run),
        command=_command(run),
    )


def _figures(result: EvaluationResult) -> list[FigureRow]:
    """Return a row for each known metric; the page itself explains a missing temperature."""
    return [
        FigureRow(name.format(result.top_k), figure(value, form), meaning.format(result.top_k))
        for name, field, form, meaning in FIGURES
        if (value := getattr(result, field)) is not None
    ]


def _reliability(reliability: Sequence[ReliabilityBin]) -> str:
    return _uri("svg+xml", reliability_diagram(reliability))


def _mistakes(probabilities: torch.Tensor, test: IdxDataset, names: Sequence[str]) -> str | None:
    picture = mistakes_picture(probabilities.numpy(), test, names)
    return _picture(picture) if picture else None


def _classes(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> list[ClassRow]:
    rows = []
    for true, counts in enumerate(matrix):
        images, predicted = sum(counts), sum(row[true] for row in matrix)
        recall = counts[true] / images if images else None
        precision = counts[true] / predicted if predicted else None
        label = class_label(names[true], 60)
        rows.append(ClassRow(label, images, recall, precision, confused_with(counts, true, names)))
    return rows


def _settings(run: RunSummary) -> list[SettingRow]:
    rows, defaults = [], resolve({}).to_json()
    for name, declared in FIELDS.items():
        value = run.settings.get(name)
        changed = name not in ("run_dir", "data_dir") and value != defaults[name]
        rows.append(SettingRow(name, setting_text(value), changed, declared.help))
    return rows


def _command(run: RunSummary) -> str:
    """Return the command that repeats the run: its recipe, and the settings that override it."""
    given = as_given(run.settings)
    if not given.keys() & {"data_dir", "dataset"}:
        given["data_dir"] = run.config.data.folder  # the folder that was found
    nproc = run.config.machine.processes if run.config.machine else 1
    return shlex.join(["dist-mnist", "train", f"--nproc={nproc}", *as_options(given)])


def _environment(run: RunSummary) -> dict[str, str]:
    data, machine = run.config.data, run.config.machine
    facts = {
        "data": data.folder, "data fingerprint": data.fingerprint,
        "images (channels, height, width)": list(data.image_shape), "classes": data.num_classes,
    }  # fmt: skip
    facts |= asdict(machine) if machine else {}
    return {name: setting_text(value) for name, value in (facts | dict(run.config.versions)).items()}


def _speed(run: RunSummary) -> dict[str, str]:
    """Return the medians over the log intervals, formatted."""
    looks = (
        ("images/s", "images_per_s", "{:,.0f}"),
        ("fraction of a step spent waiting for data", "waiting_for_data", "{:.1%}"),
        ("fraction of a step spent communicating", "communicating", "{:.1%}"),
        ("slowest rank, ms per step", "slowest_rank_ms_per_step", "{:.1f}"),
        ("fastest rank, ms per step", "fastest_rank_ms_per_step", "{:.1f}"),
        ("host memory of the largest process, GB", "memory_gb", "{:.2f}"),
        ("GPU memory of the largest process, GB", "device_memory_gb", "{:.2f}"),
    )
    found = {heading: look.format(value) for heading, name, look in looks if (value := run.median(name)) is not None}
    return found | ({"training time": clock(run.training_s)} if run.training_s else {})


def _picture(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return _uri("png", file.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
