"""Results as sentences and short figures, for terminals and pages."""

from typing import Any


def result_line(result: dict[str, Any]) -> str:
    """An evaluation's figures in a line."""
    views = "" if result["views"] == 1 else f", by {result['views']} views of each"
    return (
        f"{result['split']} accuracy {result['accuracy']:.2%} ({result['correct']} of {result['images']} images"
        f"{views}), loss {result['loss']:.4f}, at step {result['step']}"
    )


def contest_sentence(contest: dict[str, Any]) -> str:
    """Whether one of two runs is better, in words."""
    if "impossible" in contest:
        return f"Which is better on the same images cannot be said: {contest['impossible']}."
    counts = [contest[name] for name in ("both", "only_first", "only_second", "neither")]
    return (
        f"Of {sum(counts)} test images both get {counts[0]} right, only the first {counts[1]}, only the second "
        f"{counts[2]}, neither {counts[3]}. If they were equally good, so uneven a split would have a chance of "
        f"{contest['p_value']:.2g} (McNemar's exact test)."
    )


def time_taken(row: dict[str, Any]) -> str:
    """The seconds of training in minutes: `12:05`."""
    if not row["training_s"]:
        return "-"
    minutes, seconds = divmod(round(row["training_s"]), 60)
    return f"{minutes}:{seconds:02}"
