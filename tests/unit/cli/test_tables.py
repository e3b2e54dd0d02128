"""What is printed of a result: the whole confusion matrix where it fits, else what each class was taken for."""

import numpy as np
import pytest
from msgspec.structs import replace
from rich.cells import cell_len

from dist_mnist.cli.tables import result_tables
from dist_mnist.run.records import EvaluationResult


def result(num_classes: int) -> EvaluationResult:
    matrix = np.eye(num_classes, dtype=int) * 1234
    matrix[1, 0], matrix[1, -1] = 3, 40
    accuracies = (*(matrix.diagonal() / matrix.sum(1)).tolist()[:-1], None)
    images, correct = int(matrix.sum()), int(matrix.trace())
    return EvaluationResult(
        split="test", accuracy=correct / images, correct=correct, images=images, loss=0.1, step=7,
        confusion_matrix=tuple(map(tuple, matrix.tolist())), per_class_accuracy=accuracies,
    )  # fmt: skip


@pytest.mark.parametrize(("num_classes", "width"), [(10, 80), (47, 80), (47, 300), (200, 120)])
def test_result_tables_any_width_cut_no_figure(num_classes, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    result_tables(result(num_classes))
    first, _, shown = capsys.readouterr().out.partition("\n")
    assert first.startswith(f"test accuracy {result(num_classes).accuracy:.2%}")
    assert "…" not in shown
    whole = num_classes == 10 or width == 300
    assert ("predicted class by column" in shown) == whole
    assert (f"{num_classes - 1} (40), 0 (3)" in shown) == (not whole)
    assert shown.count("1234") == num_classes if whole else shown.count("100.00%") == num_classes - 2


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("num_classes", [3, 10, 40])
def test_result_tables_long_names_leave_every_line_within_the_terminal(num_classes, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    names = tuple(f"{number} [b]猫 with a name that goes on and on" for number in range(num_classes))
    result_tables(replace(result(num_classes), class_names=names))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert sum("[b]猫 with a name" in line and "%" in line for line in lines) == num_classes - 1
