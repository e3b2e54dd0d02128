"""A run, or several beside one another, as one HTML page that needs nothing else: what `dist-mnist report` makes."""

import base64
import io
import shlex
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, PackageLoader
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

from dist_mnist.config.overrides import as_options
from dist_mnist.config.recipes import RECIPES
from dist_mnist.config.resolve import resolve
from dist_mnist.config.settings import FIELDS
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.distributed.world import World
from dist_mnist.evaluation.checkpoints import predict_test
from dist_mnist.reporting.compare import compare, contest
from dist_mnist.reporting.figures import confusion_picture, mistakes_picture
from dist_mnist.reporting.statistics import wilson
from dist_mnist.reporting.text import contest_sentence, time_taken
from dist_mnist.run.records import Run
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.files import atomic_write


class Diagram(NamedTuple):
    """A metric of `metrics.jsonl` and how it is drawn."""

    heading: str
    metric: str
    factor: float = 1
    scale: str = "linear"


DIAGRAMS = (
    Diagram("loss, nats", "loss", scale="log"),
    Diagram("wrong, % of images", "wrong", 100, "log"),
    Diagram("learning rate", "learning_rate"),
    Diagram("speed, images/s", "images_per_s"),
)
STYLE: Any = {
    "svg.fonttype": "path", "svg.hashsalt": "dist_mnist", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "train": {"lw": 0.9, "alpha": 0.6},
    "validation": {"lw": 1.8, "marker": ".", "ms": 5},
}


def write_page(runs: Sequence[Run], path: Path, data_dir: Path | None, world: World) -> None:
    """Write the page of some runs to `path`.

    Args:
        data_dir: folder of the test images; None for the one that each run was trained on. Where these, or a run's
            checkpoints, are no longer there, the page says so in the place of its worst mistakes.

    Raises:
        UserError: the page cannot be written.
    """

    @cache
    def seen(path: Path) -> tuple[torch.Tensor, IdxDataset]:
        return predict_test(path, data_dir, world)

    template = Environment(loader=PackageLoader("dist_mnist.reporting", "."), autoescape=True, trim_blocks=True)
    template.filters |= {"percent": _percent, "nats": _nats, "count": _count}
    page = template.get_template("page.html").render(
        title=", ".join(run.path.resolve().name for run in runs[:4]) + (" …" if len(runs) > 4 else ""),
        rows=[row | {"time": time_taken(row)} for row in compare(list(runs))],
        contest=contest_sentence(found) if (found := contest(runs, seen)) else None,
        diagrams=[(diagram.heading, _draw(runs, diagram)) for diagram in DIAGRAMS],
        runs=[_about(run, seen) for run in runs],
    )
    try:
        with atomic_write(path) as file:
            file.write(page.encode(errors="replace"))
    except OSError as error:
        raise UserError(f"{path}: the page cannot be written ({error.strerror})") from None


def _draw(runs: Sequence[Run], diagram: Diagram) -> str:
    """One metric of all runs as an SVG image: training thin, validation strong; a data URI."""
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


def _points(run: Run, kind: str, metric: str) -> list[tuple[float, float]]:
    """Epochs and values of a metric, where it is known and not zero on a logarithmic axis."""
    per_step = next((record["epoch"] / record["step"] for record in run.records if record["epoch"]), 1.0)
    found = []
    for record in run.records:
        if record["kind"] == kind:
            wrong = metric == "wrong" and record.get("accuracy") is not None
            value = 1 - record["accuracy"] if wrong else record.get(metric)
            if value is not None and (value > 0 or metric == "learning_rate"):
                found.append((record["step"] * per_step, value))
    return found


def _about(run: Run, predict_test: Callable[[Path], tuple[torch.Tensor, IdxDataset]]) -> dict[str, Any]:
    """What the page says of one run."""
    about: dict[str, Any] = {
        "name": run.path.resolve().name, "result": run.result, "settings": _settings(run),
        "environment": _environment(run), "speed": _speed(run), "command": _command(run), "mistakes": None,
        "step": run.records[-1]["step"] if run.records else 0,
    }  # fmt: skip
    if run.result:
        matrix = run.result["confusion_matrix"]
        about |= {"interval": wilson(run.result["correct"], run.result["images"]), "classes": _classes(matrix)}
        about |= {"confusion": _picture(confusion_picture(matrix))}
        try:
            about["mistakes"] = _mistakes(*predict_test(run.path))
        except UserError as error:
            about["why_no_mistakes"] = str(error)
    return about


def _mistakes(probabilities: torch.Tensor, test: IdxDataset) -> str | None:
    picture = mistakes_picture(probabilities.numpy(), np.asarray(test.labels, np.int64), test)
    return _picture(picture) if picture else None


def _classes(matrix: list[list[int]]) -> list[dict[str, Any]]:
    """For each class: images, right, precision, and what it was most often taken for."""
    rows = []
    for true, counts in enumerate(matrix):
        predicted = sum(row[true] for row in matrix)
        wrong = sorted(((n, other) for other, n in enumerate(counts) if n and other != true), reverse=True)[:3]
        rows.append(
            {
                "class": true, "images": sum(counts), "recall": counts[true] / sum(counts) if sum(counts) else None,
                "precision": counts[true] / predicted if predicted else None,
                "taken_for": ", ".join(f"{other} ({n})" for n, other in wrong),
            }
        )  # fmt: skip
    return rows


def _settings(run: Run) -> list[dict[str, Any]]:
    """All settings, with those marked that differ from the default recipe's."""
    return [
        {
            "name": name, "help": declared.help,
            "value": _short(run.settings.get(name)),
            "changed": name not in ("run_dir", "data_dir") and run.settings.get(name) != _plain(declared.default),
        }
        for name, declared in FIELDS.items()
    ]  # fmt: skip


def _command(run: Run) -> str:
    """The command that makes the same run again: its recipe, and what was given beside it."""
    recipe = run.settings["recipe"]
    known = {"recipe": recipe if recipe in RECIPES else "default"}
    base = resolve(known).to_json()
    base["lr"] = resolve({**known, "optimizer": run.settings["optimizer"]}).lr  # depends on it, if not given
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in run.settings.items()
        if name in FIELDS and value is not None and value != base[name] and name not in ("run_dir", "precision")
    }
    if not given.keys() & {"data_dir", "dataset"}:
        given["data_dir"] = run.config["data"]["folder"]  # wherever it was found
    nproc = (run.config["machine"] or {}).get("processes", 1)
    return shlex.join(["dist-mnist", "train", f"--nproc={nproc}", *as_options({"recipe": recipe} | given)])


def _environment(run: Run) -> dict[str, str]:
    facts = run.config["data"] | (run.config["machine"] or {}) | run.config["versions"]
    names = {"folder": "data", "fingerprint": "its fingerprint", "image_shape": "images (channels, height, width)"}
    return {names.get(name, name.replace("_", " ")): _short(value) for name, value in facts.items()}


def _speed(run: Run) -> dict[str, str]:
    """Medians over the log intervals."""
    looks = (
        ("images/s", "images_per_s", "{:,.0f}"),
        ("share of a step spent waiting for data", "waiting_for_data", "{:.1%}"),
        ("share of a step spent communicating", "communicating", "{:.1%}"),
        ("slowest rank, ms a step", "slowest_rank_ms_per_step", "{:.1f}"),
        ("fastest rank, ms a step", "fastest_rank_ms_per_step", "{:.1f}"),
        ("memory of rank 0, GB", "memory_gb", "{:.2f}"),
        ("memory of its GPU, GB", "device_memory_gb", "{:.2f}"),
    )
    found = {heading: look.format(value) for heading, name, look in looks if (value := run.median(name)) is not None}
    return found | ({"time of the last start": time_taken({"training_s": run.training_s})} if run.training_s else {})


def _plain(value: Any) -> Any:
    """As in JSON."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "-" if value is None else "yes" if value is True else "no" if value is False else str(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _nats(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _picture(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return _uri("png", file.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
