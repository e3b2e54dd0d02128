"""Human-readable tables, printed on the terminal."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dist_mnist.config.recipes import Recipe
from dist_mnist.reporting.compare import ComparisonRow, MeanRow, NoComparison, PairedComparison
from dist_mnist.reporting.text import (
    class_label,
    clock,
    comparison_sentence,
    confused_with,
    figure,
    figures_lines,
    result_line,
    setting_text,
)
from dist_mnist.run.checkpoints.store import CheckpointRow, Verification
from dist_mnist.run.records import EvaluationResult
from dist_mnist.tools.measure import quantity
from dist_mnist.utils.errors import printable
from dist_mnist.utils.files import path_of

if TYPE_CHECKING:
    from dist_mnist.data.convert.summary import Summary
    from dist_mnist.evaluation.predict import Prediction
    from dist_mnist.tools.bench import BenchResult
    from dist_mnist.tools.choices import Replayed
    from dist_mnist.tools.doctor import Diagnosis
    from dist_mnist.tools.drill.faults import Outcome
    from dist_mnist.tools.suspects.folds import Suspects
    from dist_mnist.tools.sweep.search import TrialRow

MOST_UNUSABLE = 20  # pictures listed
MOST_SUSPECTS = 20


def result_tables(result: EvaluationResult) -> None:
    """Print an evaluation: its metrics, then the confusion matrix with the accuracy of each class."""
    console = Console(highlight=False)
    console.print("\n".join([result_line(result), *figures_lines(result)]))
    numbers, labels = list(map(str, range(len(result.names)))), list(map(class_label, result.names))
    numbered = [name if name == number else f"{number} {name}" for number, name in zip(numbers, labels, strict=True)]
    for rows, columns in ((labels, labels), (numbered, numbers)):
        if _width_of_matrix(result, rows, columns) <= console.width:
            console.print(_confusion_table(result, rows, columns))
            return
    console.print(_classes_table(result, labels))


def _width_of_matrix(result: EvaluationResult, rows: Sequence[str], columns: Sequence[str]) -> int:
    widest = len(str(max(map(max, result.confusion_matrix))))
    return sum(max(widest, cell_len(column)) + 2 for column in columns) + max(4, *map(cell_len, rows)) + 13


def _table(*headings: str, left: Collection[str] = (), **options: Any) -> Table:
    """Return an empty table with right-aligned columns, except those in `left`; `options` go to Table."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), **options)
    for name in headings:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table


def _confusion_table(result: EvaluationResult, rows: Sequence[str], columns: Sequence[str]) -> Table:
    title = "true class by row, predicted class by column"
    table = _table("true", *map(escape, columns), "accuracy", left=["true"], title=title)
    for true, (counts, accuracy) in enumerate(zip(result.confusion_matrix, result.per_class_accuracy, strict=True)):
        cells = [f"[bold]{n}[/]" if i == true else f"{n or '[dim]·[/]'}" for i, n in enumerate(counts)]
        table.add_row(escape(rows[true]), *cells, figure(accuracy, ".2%"))
    return table


def _classes_table(result: EvaluationResult, labels: Sequence[str]) -> Table:
    """Return a table with one row per class and its most frequent confusions, for matrices too wide to print."""
    title = "classes (--json has the whole confusion matrix)"
    left = ["confused with"] if labels == list(map(str, range(len(labels)))) else ["true", "confused with"]
    table = _table("true", "images", "accuracy", "confused with", left=left, title=title)
    for true, (counts, accuracy) in enumerate(zip(result.confusion_matrix, result.per_class_accuracy, strict=True)):
        confused = escape(confused_with(counts, true, result.names))
        table.add_row(escape(labels[true]), str(sum(counts)), figure(accuracy, ".2%"), confused)
    return table


def prediction_line(prediction: "Prediction", names: Sequence[str]) -> str:
    """Return an image's most probable classes with probabilities: `seven.png: 7 (98.2 %), 1 (1.5 %)`."""
    ranked = sorted(enumerate(prediction.probabilities), key=lambda pair: -pair[1])[:3]
    likely = [
        f"{class_label(names[number], 60)} ({chance:.1%})"
        for number, chance in ranked
        if number == prediction.predicted or chance > 1e-3
    ]
    index = "" if prediction.index is None else f" {prediction.index}"
    return f"{prediction.file}{index}: {', '.join(likely)}"


def recipes_table(recipes: Mapping[str, Recipe]) -> None:
    """Print recipes with their descriptions and their differences from the defaults."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("recipe", no_wrap=True)
    table.add_column("description, and settings that differ from the default", overflow="fold")
    for recipe, found in recipes.items():
        differences = {name: value for name, value in found.settings.items() if value is not None}
        settings = ", ".join(f"{name.replace('_', '-')} {setting_text(value)}" for name, value in differences.items())
        table.add_row(recipe, f"{found.about}\n[dim]{settings}[/]" if settings else found.about)
    Console(highlight=False).print(table)


def import_page(summary: "Summary") -> None:
    """Print the summary of an import: its classes, then remarks."""
    console = Console(highlight=False)
    height, width, channels = summary.image_shape
    console.print(
        _as_text(
            f"{summary.folder}: {summary.training_images} training and {summary.test_images} test images of {height}x"
            f"{width} pixels ({'gray' if channels == 1 else 'RGB'}) in {len(summary.classes)} classes, from "
            f"{summary.source}"
        )
    )
    table = _table("label", "class", "training", "test", left=["class"])
    for label, found in enumerate(summary.classes):
        table.add_row(str(label), _as_text(found.name), str(found.train), str(found.test))
    console.print(table)
    for line in _import_remarks(summary):
        console.print(_as_text(line))


def _import_remarks(summary: "Summary") -> Iterator[str]:
    """Yield remarks worth checking, one line each; counts of zero are omitted."""
    yield from summary.notes
    counts: Counter[str] = Counter()
    for found in summary.source_sizes:  # it has separate entries for gray and colour pictures
        counts[f"{found.height}x{found.width}"] += found.pictures
    sizes = [f"{size} ({count})" for size, count in counts.most_common()]
    if len(sizes) > 1:
        yield f"sizes of the pictures: {', '.join(sizes)}" + (
            f" and {summary.other_sizes} more" * bool(summary.other_sizes)
        )
    for count, what in (
        (summary.duplicates_in_training, "training images are exact duplicates of others"),
        (summary.duplicates_in_test, "test images are exact duplicates of others"),
        (summary.test_images_in_training, "test images are also among the training images"),
        (summary.duplicates_of_other_classes, "images occur with several labels"),
        (summary.blank_images, "images are blank"),
        (summary.unusable_pictures, "unusable pictures were skipped:"),
    ):
        if count:
            yield f"{count} {what}"
    yield from (f"  {why}" for why in summary.unusable[:MOST_UNUSABLE])
    if summary.unusable_pictures > MOST_UNUSABLE:
        yield f"  and {summary.unusable_pictures - MOST_UNUSABLE} more"
    yield f"contact sheet: {summary.contact_sheet}"


def suspects_table(found: "Suspects") -> None:
    """Print the most suspicious labels."""
    console = Console(highlight=False)
    console.print()
    console.print(
        f"{len(found.suspects)} of {found.images} labels are suspicious; about {found.estimated_errors:.0f} are "
        f"estimated to be wrong; held-out accuracy {found.held_out_accuracy:.2%} over {found.folds} folds"
    )
    if not found.suspects:
        return
    table = _table("index", "label", "rather", "P(label)", "P(rather)", left=["label", "rather"])
    for one in found.suspects[:MOST_SUSPECTS]:
        names = (class_label(name) for name in (one.given_name, one.suggested_name))
        chances = (f"{one.self_confidence:.2%}", f"{one.suggested_confidence:.2%}")
        table.add_row(str(one.index), *map(escape, names), *chances)
    console.print(table)
    if len(found.suspects) > MOST_SUSPECTS:
        console.print(f"and {len(found.suspects) - MOST_SUSPECTS} more, in suspects.csv")


def facts_table(title: str, facts: Mapping[str, object]) -> None:
    """Print names and values."""
    table = Table(title=title, box=box.SIMPLE, show_header=False)
    for name, value in facts.items():
        table.add_row(name, _as_text(str(value)))
    Console(highlight=False).print(table)


def checkpoints_table(rows: Sequence[CheckpointRow]) -> None:
    """Print the checkpoints of a run."""
    table = _table("file", "step", "epoch", "validation accuracy", "MB", "", left=("file", ""))
    for row in rows:
        accuracy, size = figure(row.validation_accuracy, ".2%"), f"{row.bytes / 1e6:.1f}"
        mark = "DAMAGED" if row.step is None else "best" if row.best else ""
        table.add_row(row.file, figure(row.step, "d"), figure(row.epoch, ".2f"), accuracy, size, mark)
    Console(highlight=False).print(table)


def verification_table(rows: Sequence[Verification]) -> None:
    """Print the verdict on each checkpoint."""
    for row in rows:
        print(f"{row.file}  {row.fault or 'ok'}")


def replay_line(replayed: "Replayed") -> str:
    """Return one line about a replayed segment of a run."""
    steps = f"steps {replayed.start} to {replayed.stop}"
    if replayed.reproduced:
        close = "" if replayed.distance is None else f" within {replayed.distance:.1%} of the weights' movement"
        return f"{steps:24}reproduced{close}"
    largest = "" if replayed.largest_difference is None else f" (by up to {replayed.largest_difference:.1e})"
    what = f": first in {replayed.first_different}{largest}" if replayed.first_different else ""
    return f"{steps:24}DIFFERS from step {replayed.differs_from_step}{what}"


def drill_line(outcome: "Outcome") -> str:
    """Return one line about a drill."""
    where = outcome.phase if outcome.step is None else f"step {outcome.step}, {outcome.phase}"
    starts = f"{outcome.starts} start{'s' if outcome.starts > 1 else ''}"
    left = f"LEFT BEHIND: {', '.join(outcome.left)}  " if outcome.left else ""
    when = f"after {outcome.moment_s:5.1f} s"
    return f"{outcome.fault:9}{when}  {where:32.32}  {starts}  {outcome.verdict}  {left}{outcome.said}"


def doctor_page(diagnosis: "Diagnosis") -> None:
    """Print a diagnosis: the ranks, the checks, the all-reduce speed, and the problems last."""
    console = Console(highlight=False, soft_wrap=True)
    ranks = _table("ranks", "host", "device", "cores", left=("ranks", "host", "device"))
    for host in dict.fromkeys(rank.host for rank in diagnosis.ranks):
        here = [rank for rank in diagnosis.ranks if rank.host == host]
        numbers = ", ".join(str(rank.rank) for rank in here)
        ranks.add_row(numbers, host, ", ".join(dict.fromkeys(rank.name for rank in here)), str(here[0].cores))
    console.print(ranks)
    width = max(len(finding.what) for finding in diagnosis.findings)
    for finding in diagnosis.findings:
        mark = "PROBLEM" if finding.problem else "ok     "
        console.print(f"{mark}  {finding.what:{width}}  {finding.found}", markup=False)
    if diagnosis.all_reduce:
        speeds = _table("size", "time", "bus bandwidth", title="all-reduce over all ranks", title_justify="left")
        for row in diagnosis.all_reduce:
            speeds.add_row(row.size, f"{row.seconds * 1e3:.2f} ms", f"{row.bus_gb_per_s:.2f} GB/s")
        console.print(speeds)
    for finding in diagnosis.problems:
        console.print(f"{finding.what}: {finding.problem}", markup=False)
    wrong = len(diagnosis.problems)
    console.print("These ranks can train together." if not wrong else f"{wrong} checks failed: see above.")


def bench_page(result: "BenchResult") -> None:
    """Print a benchmark: each part compared with its limit, and the phases of a step."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{result.device}, {result.cores} cores, torch {result.versions['torch']}, {result.precision}, recipe "
        f"{result.recipe!r}\nmatrix product {result.matrix_gflop_per_s:,.0f} GFLOP/s, copy "
        f"{result.copied_gb_per_s:,.0f} GB/s; ratios are medians of {result.rounds} rounds (range)\n"
    )
    for row in result.figures:
        value, limit = quantity(row.value), quantity(row.limit_value)
        ratio = f"{row.ratio:.2f} ({row.lowest:.2f} to {row.highest:.2f})"
        console.print(f"{row.what:24}{value:>8} {row.unit:8}  {ratio} of {row.limit}: {limit}")
    if result.phases:
        console.print("time of a step: " + ", ".join(f"{phase} {part:.1%}" for phase, part in result.phases.items()))


def means_page(rows: Sequence[MeanRow]) -> None:
    """Print means over seeds, with standard deviation and confidence interval."""
    headings = ("settings", "runs", "mean", "standard deviation", "95 % CI", "lowest", "highest", "time")
    table = _table(*headings, left=["settings"])
    for row in rows:
        table.add_row(
            _as_text(", ".join(f"{name}={value}" for name, value in row.settings.items()) or f"recipe {row.recipe}"),
            str(row.runs),
            f"{row.accuracy:.2%}",
            figure(row.standard_deviation, ".3%"),
            "{:.2%} to {:.2%}".format(*row.confidence_interval) if row.confidence_interval else "-",
            f"{row.lowest:.2%}",
            f"{row.highest:.2%}",
            clock(row.training_s),
        )
    Console(highlight=False).print(table)


def compare_page(rows: Sequence[ComparisonRow], pair: PairedComparison | NoComparison | None) -> None:
    """Print runs, the settings in which they differ, and for two runs the paired comparison."""
    console = Console(highlight=False)
    table = _table("run", "accuracy (95 % CI)", "loss", "parameters", "images/s", "time", left=["run"])
    for row in rows:
        accuracy = "not finished"
        if row.accuracy is not None and row.confidence_interval is not None:
            accuracy = "{:.2%} ({:.2%} to {:.2%})".format(row.accuracy, *row.confidence_interval)
        figures = (figure(row.loss, ".4f"), figure(row.parameters, ","), figure(row.images_per_s, ",.0f"))
        table.add_row(_as_text(path_of(row.run).name), accuracy, *figures, clock(row.training_s))
    console.print(table)
    if any(row.balanced_accuracy is not None for row in rows):
        console.print(_figures_table(rows))
    for name in rows[0].settings:
        values = [(row.settings[name], row.run) for row in rows]
        if not all(f"{name}={value}" in run for value, run in values):
            console.print(_as_text(f" {name}: {' | '.join(str(value) for value, _ in values)}"))
    if pair:
        console.print(comparison_sentence(pair))


def _figures_table(rows: Sequence[ComparisonRow]) -> Table:
    """Return a table of further metrics, which do not fit into the first table in 80 columns."""
    ks = {row.top_k for row in rows if row.top_k}
    top = f"top-{ks.pop()}" if len(ks) == 1 else "top-k"
    table = _table("run", "balanced", "macro F1", top, "AUC", "Brier", "ECE", "loss at T", left=["run"])
    for row in rows:
        percents = [figure(value, ".2%") for value in (row.balanced_accuracy, row.macro_f1, row.top_k_accuracy)]
        scores = (figure(row.auc, ".5f"), figure(row.brier, ".4f"), figure(row.ece, ".2%"))
        table.add_row(_as_text(path_of(row.run).name), *percents, *scores, figure(row.calibrated_loss, ".4f"))
    return table


def search_table(rows: "Sequence[TrialRow]") -> None:
    """Print the trials of a search with their values; test accuracies are not used for the choice."""
    names = list(rows[0].values) if rows else []
    table = _table("trial", *names, "validation", "test", "time", "", left=["trial", ""])
    for row in rows:
        figures = (figure(row.validation_accuracy, ".2%"), figure(row.test_accuracy, ".2%"), clock(row.training_s))
        note = "" if row.state == "complete" else row.state + (f": {row.reason}" if row.reason else "")
        values = [_as_text(_rounded(row.values.get(name, "-"))) for name in names]
        table.add_row(_as_text(path_of(row.run).name), *values, *figures, _as_text(note))
    Console(highlight=False).print(table)


def _rounded(value: str) -> str:
    """Return a number with four significant digits."""
    try:
        return value if value.isdecimal() else f"{float(value):.4g}"
    except ValueError:
        return value


def _as_text(text: str) -> str:
    """Return text from a run's files with markup and control characters escaped."""
    return escape(printable(text))
