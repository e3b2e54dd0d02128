"""Results as sentences and short figures, for terminals and pages."""

from dist_mnist.reporting.compare import NoComparison, PairedComparison
from dist_mnist.run.records import EvaluationResult


def result_line(result: EvaluationResult) -> str:
    """An evaluation's figures in a line."""
    views = "" if result.views == 1 else f", by {listed(result.views)} views of each"
    loss = "-" if result.loss is None else f"{result.loss:.4f}"
    return (
        f"{result.split} accuracy {result.accuracy:.2%} ({result.correct} of {result.images} images{views}), loss "
        f"{loss}, at step {listed(result.step)}"
    )


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
    )


def clock(seconds: float | None) -> str:
    """Minutes and seconds, such as `12:05`; a dash for none."""
    if not seconds:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
