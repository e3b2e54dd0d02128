"""Results as sentences and formatted numbers, for terminals and pages."""

import unicodedata
from collections.abc import Sequence

from rich.cells import cell_len

from dist_mnist.data.sources.classes import is_printable
from dist_mnist.reporting.compare import NoComparison, PairedComparison, PairedDifference
from dist_mnist.run.records import EvaluationResult, RunSeconds
from dist_mnist.utils.errors import printable

RIGHT_TO_LEFT = ("R", "AL", "AN")  # Unicode bidirectional classes that change the direction of a line
ISOLATED = "\u2068{}\u2069"  # isolates such a name, so that the text around it keeps its direction


def result_line(result: EvaluationResult) -> str:
    """Return an evaluation's result as one line."""
    views = "" if result.views == 1 else f", TTA over {listed(result.views)} views"
    held_out = f", {result.held_out:.0%} of the training files held out" if result.held_out else ""
    images = f"{result.correct} of {result.images} images{held_out}{views}"
    loss = figure(result.loss, ".4f")
    return f"{result.split} accuracy {result.accuracy:.2%} ({images}), loss {loss}, at step {listed(result.step)}"


def figures_lines(result: EvaluationResult) -> list[str]:
    """Return an evaluation's other metrics as two lines; none for a result of an earlier version."""
    if result.balanced_accuracy is None:
        return []
    top = f", top-{result.top_k} accuracy {figure(result.top_k_accuracy, '.2%')}" if result.top_k else ""
    return [
        f"balanced accuracy {result.balanced_accuracy:.2%}, macro F1 {figure(result.macro_f1, '.2%')}{top}, "
        f"AUC {figure(result.auc, '.5f')}",
        f"ECE {figure(result.ece, '.2%')}, Brier score {figure(result.brier, '.4f')}, {temperature_clause(result)}",
    ]


def temperature_clause(result: EvaluationResult) -> str:
    """Return the loss at the best temperature as a clause."""
    if result.temperature is None:
        return "no best temperature (fitting it needs mistakes on validation images)"
    return f"loss {figure(result.calibrated_loss, '.4f')} at temperature {result.temperature:.3f}"


def seconds_line(seconds: RunSeconds | None) -> str:
    """Return a run's wall-clock times as one line."""
    if seconds is None:
        return "not measured: this process did not train from the first step"
    return (
        f"training {seconds.training:.2f} s, with evaluation {seconds.training_with_evaluation:.2f} s, since the "
        f"start of Python {seconds.since_start:.2f} s"
    )


def figure(value: float | None, form: str) -> str:
    """Format a number, such as by `.2%`; a dash for None."""
    return "-" if value is None else format(value, form)


def setting_text(value: object) -> str:
    """Format a setting's value for a table: yes or no, numbers separated by commas, a dash for None."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "none"
    return "-" if value is None else str(value)


def confused_with(counts: Sequence[int], true: int, names: Sequence[str]) -> str:
    """List the three classes that a class was most often mistaken for, from its row of the confusion matrix."""
    wrong = sorted((-n, predicted) for predicted, n in enumerate(counts) if n and predicted != true)[:3]
    return ", ".join(f"{class_label(names[predicted], 16)} ({-n})" for n, predicted in wrong)


def class_label(name: str, width: int = 24) -> str:
    """Return a class's name for a line of text, at most `width` terminal columns wide.

    It has no effect on the text around it, whoever wrote it: control characters are escaped, its direction is isolated.
    """
    text = name if is_printable(name) else printable(name).replace("\n", "\\n")
    if cell_len(text) > width or len(text) > 4 * width:  # combining accents take no column
        end = min(len(text), 4 * width)
        while cell_len(text[:end]) > width - 1:
            end -= 1
        text = text[:end] + "…"
    turned = any(unicodedata.bidirectional(character) in RIGHT_TO_LEFT for character in text)
    return ISOLATED.format(text) if turned else text


def listed(numbers: int | tuple[int, ...]) -> str:
    """Format one number, or several separated by commas."""
    return str(numbers) if isinstance(numbers, int) else ", ".join(map(str, numbers))


def comparison_sentence(comparison: PairedComparison | NoComparison) -> str:
    """Return in words whether one of two runs is better."""
    if isinstance(comparison, NoComparison):
        return f"The runs cannot be compared on the same images: {comparison.impossible}."
    counts = (comparison.both, comparison.only_first, comparison.only_second, comparison.neither)
    return (
        f"Of {sum(counts)} test images, both runs get {counts[0]} right, only the first {counts[1]}, only the second "
        f"{counts[2]}, neither {counts[3]}. McNemar's exact test: p = {comparison.p_value:.2g}, the probability of a "
        "split at least this uneven if both were equally good."
        + _difference(" Loss of the first minus the second:", comparison.loss_difference)
        + _difference(" Brier score of the first minus the second:", comparison.brier_difference)
    )


def _difference(words: str, found: PairedDifference | None) -> str:
    """Format a difference of means with its confidence interval."""
    return f"{words} {found.mean:+.4f} (95 % CI {found.low:+.4f} to {found.high:+.4f})." if found else ""


def clock(seconds: float | None) -> str:
    """Format seconds as minutes and seconds, such as `12:05`; a dash for None."""
    if not seconds:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
