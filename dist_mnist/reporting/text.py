"""Results as sentences and short figures, for terminals and pages."""

import unicodedata
from collections.abc import Sequence

from rich.cells import cell_len

from dist_mnist.data.sources.classes import is_printable
from dist_mnist.reporting.compare import NoComparison, PairedComparison, PairedDifference
from dist_mnist.run.records import EvaluationResult, RunSeconds
from dist_mnist.utils.errors import printable

RIGHT_TO_LEFT = ("R", "AL", "AN")  # Unicode's classes of characters that turn the direction of a line
ISOLATED = "\u2068{}\u2069"  # by which such a name turns nothing but itself


def result_line(result: EvaluationResult) -> str:
    """An evaluation's figures in a line."""
    views = "" if result.views == 1 else f", by {listed(result.views)} views of each"
    held_out = f", {result.held_out:.0%} of the training files held out" if result.held_out else ""
    images = f"{result.correct} of {result.images} images{held_out}{views}"
    loss = figure(result.loss, ".4f")
    return f"{result.split} accuracy {result.accuracy:.2%} ({images}), loss {loss}, at step {listed(result.step)}"


def figures_lines(result: EvaluationResult) -> list[str]:
    """An evaluation's other figures, in two lines; none where an earlier version made it."""
    if result.balanced_accuracy is None:
        return []
    top = f", top-{result.top_k} accuracy {figure(result.top_k_accuracy, '.2%')}" if result.top_k else ""
    return [
        f"balanced accuracy {result.balanced_accuracy:.2%}, macro F1 {figure(result.macro_f1, '.2%')}{top}, "
        f"AUC {figure(result.auc, '.5f')}",
        f"ECE {figure(result.ece, '.2%')}, Brier score {figure(result.brier, '.4f')}, {temperature_clause(result)}",
    ]


def temperature_clause(result: EvaluationResult) -> str:
    """The loss at the best temperature, in words."""
    if result.temperature is None:
        return "no temperature (validation images fit it)"
    return f"loss {figure(result.calibrated_loss, '.4f')} at temperature {result.temperature:.3f}"


def seconds_line(seconds: RunSeconds | None) -> str:
    """What a run took, in a line."""
    if seconds is None:
        return "not told: this process has not trained from the first step"
    return (
        f"training {seconds.training:.2f} s, with evaluation {seconds.training_with_evaluation:.2f} s, since the "
        f"start of Python {seconds.since_start:.2f} s"
    )


def figure(value: float | None, form: str) -> str:
    """A number in a format such as `.2%`; a dash for none."""
    return "-" if value is None else format(value, form)


def setting_text(value: object) -> str:
    """A setting's value in a table: yes or no, numbers with commas between them, a dash for none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "none"
    return "-" if value is None else str(value)


def confused_with(counts: Sequence[int], true: int, names: Sequence[str]) -> str:
    """The three classes that images of a class were most often taken for, of its row of the confusion matrix."""
    wrong = sorted((-n, predicted) for predicted, n in enumerate(counts) if n and predicted != true)[:3]
    return ", ".join(f"{class_label(names[predicted], 16)} ({-n})" for n, predicted in wrong)


def class_label(name: str, width: int = 24) -> str:
    """A class's name as part of a line, in a terminal at most `width` columns wide; one without direction or effect on
    what stands beside it, whoever wrote it."""
    text = name if is_printable(name) else printable(name).replace("\n", "\\n")
    if cell_len(text) > width or len(text) > 4 * width:  # any number of accents takes no column
        end = min(len(text), 4 * width)
        while cell_len(text[:end]) > width - 1:
            end -= 1
        text = text[:end] + "…"
    turned = any(unicodedata.bidirectional(character) in RIGHT_TO_LEFT for character in text)
    return ISOLATED.format(text) if turned else text


def listed(numbers: int | tuple[int, ...]) -> str:
    """One number, or several with commas between them."""
    return str(numbers) if isinstance(numbers, int) else ", ".join(map(str, numbers))


def comparison_sentence(comparison: PairedComparison | NoComparison) -> str:
    """Whether one of two runs is better, in words."""
    if isinstance(comparison, NoComparison):
        return f"Which is better on the same images cannot be said: {comparison.impossible}."
    counts = (comparison.both, comparison.only_first, comparison.only_second, comparison.neither)
    return (
        f"Of {sum(counts)} test images both get {counts[0]} right, only the first {counts[1]}, only the second "
        f"{counts[2]}, neither {counts[3]}. If they were equally good, so uneven a split would have a chance of "
        f"{comparison.p_value:.2g} (McNemar's exact test)."
        + _difference(" The first one's loss less the second's is", comparison.loss_difference)
        + _difference(" Of the Brier score the difference is", comparison.brier_difference)
    )


def _difference(words: str, found: PairedDifference | None) -> str:
    """A difference of means with its confidence interval."""
    return f"{words} {found.mean:+.4f} (95 % CI {found.low:+.4f} to {found.high:+.4f})." if found else ""


def clock(seconds: float | None) -> str:
    """Minutes and seconds, such as `12:05`; a dash for none."""
    if not seconds:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
