"""`dist-mnist sweep`: the grid, what is checked before it starts, and real small sweeps that fail, stop and go on."""

import json
import signal
from pathlib import Path

import pytest

from dist_mnist.tools.sweep.grid import Sweep, combinations, folder
from dist_mnist.tools.sweep.words import options
from dist_mnist.utils.errors import UserError
from helpers.runs import finish, sweep, wait_for


def test_combinations_of_several_values_are_a_grid():
    found = [folder(one) for one in combinations(["lr=0.1", "seed=0", "lr=0.2", "seed=1"])]
    assert found == ["lr=0.1,seed=0", "lr=0.1,seed=1", "lr=0.2,seed=0", "lr=0.2,seed=1"]
    assert options(combinations(["conv_channels=4,8", "nesterov=false", "invariant=true"])[0]) == [
        "--conv-channels=4,8", "--no-nesterov", "--invariant",
    ]  # fmt: skip
    assert list(map(folder, combinations(["beta1=0.8", "batch-size=50"]))) == ["beta1=0.8,batch_size=50"]
    assert folder(combinations(["data_dir=/data/mnist"])[0]) == "data_dir=_data_mnist", "one folder, and not several"


def test_sweep_values_win_over_those_for_all_runs():
    planned = Sweep(["seed=0", "seed=1", "steps=10"], Path("runs"), {"seed": 5, "epochs": 3.0, "lr": 0.1})
    assert planned.runs == {
        Path("runs") / f"seed={seed},steps=10": ["--lr=0.1", f"--seed={seed}", "--steps=10"] for seed in (0, 1)
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "no settings to combine"), (["lr"], "expected NAME=VALUE"), (["=3"], "got =3"), (["3=4"], "got 3=4"),
     (["lr=0.1", "seed=1", "lr=0.1"], "lr=0.1,seed=1 is repeated"),
     (["batch_size=5", "batch-size=5"], "is repeated"), (["run-dir=a", "run-dir=b"], "run_dir cannot be searched")],
)  # fmt: skip
def test_combinations_of_words_that_are_none_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        combinations(words)


def test_sweep_trains_and_compares_every_combination(digits, tmp_path):
    code, out, err = finish(sweep(digits, tmp_path, "lr=0.05", "lr=0.1", "seed=0", "seed=1", "--steps=10"))
    assert code == 0 and err == "", err
    names = [f"lr={lr},seed={seed}" for lr in (0.05, 0.1) for seed in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        settings = json.loads((tmp_path / name / "config.json").read_text())["settings"]
        assert name == f"lr={settings['lr']},seed={settings['seed']}"
    table = out.split("accuracy (95 % CI)")[1]
    assert all(name in table for name in names) and "tensorboard --logdir" not in table, "as there are no files for it"
    again = sweep(digits, tmp_path, "lr=0.1", "seed=0", "--steps=10")
    code, out, _ = finish(again)
    assert code == 0 and "test accuracy" not in out and names[2] in out, "what is finished is not run again"


def test_sweep_with_a_mistake_in_one_starts_none(digits, tmp_path):
    code, out, err = finish(sweep(digits, tmp_path, "seed=0", "crop=0", "crop=3", "--steps=10"))
    assert code == 2 and "--crop 3 does not fit" in err and "nothing was started" in err
    assert "step" not in out and not list(tmp_path.glob("*/checkpoints/*"))


def test_sweep_with_a_failing_run_finishes_the_others(digits, tmp_path):
    # A gradient that is not finite ends a run; with so high a rate that comes soon.
    code, out, err = finish(sweep(digits, tmp_path, "lr=1e30", "lr=0.1", "--steps=30", "--batch-norm=none"))
    assert code == 1 and f"error: the run in {tmp_path / 'lr=1e30'} failed: see above" in err
    assert (tmp_path / "lr=0.1" / "result.json").exists() and "lr=0.1" in out.split("accuracy (95 % CI)")[1]


def test_sweep_stopped_and_started_again_resumes(digits, tmp_path):
    words = ("seed=0", "seed=1", "--steps=400", "--log-every=10")
    process = sweep(digits, tmp_path, *words)
    metrics = tmp_path / "seed=0" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text(), process)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 0 and "stopped with 0 of 2 runs finished; run the same command to resume" in out, err
    assert (tmp_path / "seed=0" / "stopped.json").exists() and not (tmp_path / "seed=1").exists()
    code, out, err = finish(sweep(digits, tmp_path, *words))
    assert code == 0 and "resume    after step" in out, err
    assert all((tmp_path / f"seed={seed}" / "result.json").exists() for seed in (0, 1))
