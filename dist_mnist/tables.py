"""Tables for people, printed on the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def result_tables(result: dict[str, Any]) -> None:
    """Print an evaluation: its figures, then the confusion matrix with each class's accuracy."""
    console = Console(highlight=False)
    console.print(
        f"{result['split']} accuracy {result['accuracy']:.2%} ({result['correct']} of {result['images']} images), "
        f"loss {result['loss']:.4f}, at step {result['step']}"
    )
    table = Table(title="true class by row, predicted class by column", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("true")
    for predicted in range(len(result["confusion_matrix"])):
        table.add_column(str(predicted), justify="right")
    table.add_column("accuracy", justify="right")
    rows = zip(result["confusion_matrix"], result["per_class_accuracy"], strict=True)
    for true, (counts, accuracy) in enumerate(rows):
        cells = [f"[bold]{n}[/]" if i == true else f"{n or '[dim]·[/]'}" for i, n in enumerate(counts)]
        table.add_row(str(true), *cells, "-" if accuracy is None else f"{accuracy:.2%}")
    console.print(table)


def facts_table(title: str, facts: dict[str, Any]) -> None:
    """Print names and values."""
    table = Table(title=title, box=box.SIMPLE, show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    Console(highlight=False).print(table)


def checkpoints_table(rows: list[dict[str, Any]]) -> None:
    """Print the checkpoints of a run."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("file", "step", "epoch", "validation accuracy", "MB", ""):
        table.add_column(name, justify="left" if name in ("file", "") else "right")
    for row in rows:
        accuracy = "-" if row["validation_accuracy"] is None else f"{row['validation_accuracy']:.2%}"
        mark = "best" if row["best"] else ""
        table.add_row(row["file"], str(row["step"]), f"{row['epoch']:.2f}", accuracy, f"{row['bytes'] / 1e6:.1f}", mark)
    Console(highlight=False).print(table)
