"""The harness of all measurements: turns, ratios within rounds, and runs of another checkout."""

from pathlib import Path

import pytest

from dist_mnist.tools.measure import by_turns, quantity, rate, train


def test_by_turns_compares_what_was_measured_in_the_same_round():
    work, limit = iter([2.0, 30.0, 10.0]), iter([4.0, 40.0, 40.0])
    mine, other = by_turns({"work": lambda: next(work), "limit": lambda: next(limit)}, 3, reference="limit")
    assert (mine.name, mine.value, mine.ratio, mine.lowest, mine.highest) == ("work", 10, 0.5, 0.25, 0.75)
    assert (other.value, other.ratio, other.lowest, other.highest) == (40, 1, 1, 1)


def test_by_turns_reverses_the_order_every_other_round():
    called: list[str] = []
    by_turns({name: lambda name=name: called.append(name) or 1.0 for name in "abc"}, 3, reference="a")
    assert "".join(called) == "abccbaabc"


def test_rate_leaves_the_first_batch_out_and_ends_with_the_pipeline():
    given: list[int] = []

    def pipeline():
        for size in (1000, 3, 4):
            given.append(size)
            yield size

    assert 0 < rate(pipeline, 60) < 1e9
    assert given == [1000, 3, 4]


@pytest.mark.parametrize(("value", "shown"), [(5.5e6, "5.50 M"), (1680.4, "1,680"), (8.014, "8.01"), (99.9, "99.9")])
def test_quantity_shows_three_digits(value, shown):
    assert quantity(value) == shown


def test_train_of_another_checkout_runs_its_package(tmp_path: Path):
    """A package that only writes one line of metrics shows which one was run, and with which options."""
    (tmp_path / "dist_mnist").mkdir()
    (tmp_path / "dist_mnist" / "train.py").write_text(
        "import json, pathlib, sys\n"
        "run = pathlib.Path(next(word for word in sys.argv if word.startswith('--run-dir='))[10:])\n"
        "run.mkdir()\n"
        "line = dict(kind='train', step=len(sys.argv), epoch=0.5, loss=1.0, images_per_s=7.0, elapsed_s=2.0)\n"
        "(run / 'metrics.jsonl').write_text(json.dumps(line) + chr(10))\n"
    )
    [line] = train("--steps=2", "--lr=1", checkout=tmp_path)
    assert line.images_per_s == 7 and line.step == 5  # the program, --no-tensorboard, --run-dir and these two
