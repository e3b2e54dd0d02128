"""`dist-mnist sweep --search`: what is drawn, and real small searches that fail, prune, are killed and go on."""

import errno
import json
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_mnist.run.directory import RunDirectory
from dist_mnist.run.records import MetricsRecord
from dist_mnist.tools.choices import SearchMethod
from dist_mnist.tools.sweep.grid import Sweep
from dist_mnist.tools.sweep.process import Trainings
from dist_mnist.tools.sweep.search import Search, TrialRow, _validations
from dist_mnist.tools.sweep.study import Lock, SearchSettings, distributions, open_study
from dist_mnist.tools.sweep.words import Interval, search_space
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.files import to_json
from helpers.runs import digest, dist_mnist, finish, sweep, train_here, wait_for

pytest.importorskip("optuna", reason="needs the extra 'search'")


def test_words_say_intervals_and_choices():
    space = search_space(
        ["lr=loguniform:0.01:0.5", "dropout=uniform:0:0.6", "batch-size=int:50:500", "seed=3", "seed=4"]
    )
    assert space == {
        "lr": Interval(0.01, 0.5, log=True), "dropout": Interval(0, 0.6), "batch_size": Interval(50, 500, whole=True),
        "seed": ("3", "4"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr=loguniform:0.5"], "expected two numbers, the lowest and the highest, as loguniform:LOW:HIGH"),
        (["lr=uniform:a:b"], "expected two numbers"),
        (["batch_size=int:1.5:3"], "expected two whole numbers"),
        (["lr=uniform:0.5:0.1"], "expected two finite numbers, the first of which is the lower one"),
        (["lr=uniform:0:inf"], "expected two finite numbers"),
        (["lr=loguniform:0:1"], "logarithms need numbers above 0"),
        (["dropout=uniform:0:2"], "--dropout must be at least 0 and at most 0.99"),
        (["batch_size=uniform:1:3"], "--batch-size expects integers; give int:LOW:HIGH"),
        (["schedule=int:1:3"], "--schedule"),
        (["learningrate=uniform:0:1"], "unknown setting 'learningrate'"),
        (["lr=uniform:0:1", "lr=0.5"], "lr has the interval uniform:0:1 and other values"),
        (["seed=1", "seed=1"], "seed has a value twice"),
        (["lr=0.1", "lr=0.2", "lr=1e-1"], "lr has a value twice (0.1, 0.2, 1e-1)"),
        (["seed=1"], "there is nothing to search"),
        (["run_dir=a", "run_dir=b"], "run_dir cannot be searched or swept"),
        (["model={cnn,mlp}"], "model={cnn,mlp}: bash expands these braces unless they are quoted"),
    ],
    ids=str,
)
def test_words_that_are_no_space_are_refused(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        search_space(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lr=uniform:0:1",), "lr=uniform:0:1 is an interval to search: give --search"),
        (("seed=1", "seed=2", "--trials=3"), "are for a search: give --search too"),
        (("seed=1", "seed=2", "--search=random"), "give --trials N"),
        (("seed=1", "seed=2", "--search=random", "--trials=3"), "at most 2, the number of combinations; got 3"),
        (("seed=1", "seed=2", "--search=halving", "--prune", "--trials=2"), "always prunes"),
        (("seed=1", "seed=2", "--search=tpe", "--trials=2", "--validation-fraction=0"), "on the validation split"),
    ],
    ids=str,
)
def test_options_that_make_no_search_are_refused_and_nothing_is_made(words, message, tmp_path):
    done = dist_mnist("sweep", *words, f"--run-dir={tmp_path / 'sweep'}")
    assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())


SPACE = {"lr": ("0.1", "0.2", "0.3"), "batch_size": Interval(50, 51, whole=True)}


def study_in(folder: Path, method: SearchMethod, space=SPACE, seed: int = 0):
    settings = SearchSettings(method=method, prune=False, seed=seed, space={}, options=[])
    return open_study(Lock(folder / "journal.log"), space, settings)


def points(study, space=SPACE):
    """What it draws, trial by trial, whose result is a function of it."""
    while True:
        trial = study.ask(distributions(space))
        study.tell(trial, trial.params["batch_size"] / 500)
        yield trial.params


@pytest.mark.parametrize("method", SearchMethod)
def test_no_point_is_drawn_twice_until_there_are_no_more(method, tmp_path):
    drawn = [json.dumps(point) for point in islice(points(study_in(tmp_path, method)), 6)]
    assert len(set(drawn)) == 6


def test_search_that_is_started_again_draws_what_it_would_have_drawn_and_another_seed_something_else(tmp_path):
    space = {
        "lr": Interval(0.01, 0.5, log=True),
        "dropout": Interval(0, 0.5),
        "batch_size": Interval(50, 500, whole=True),
    }
    for name in ("whole", "again", "other"):
        (tmp_path / name).mkdir()
    whole = list(islice(points(study_in(tmp_path / "whole", SearchMethod.TPE, space), space), 14))
    again = [
        point
        for _ in range(7)
        for point in islice(points(study_in(tmp_path / "again", SearchMethod.TPE, space), space), 2)
    ]
    assert whole == again
    other = list(islice(points(study_in(tmp_path / "other", SearchMethod.TPE, space, seed=1), space), 2))
    assert other[0] != whole[0]
    assert all(type(point["batch_size"]) is int and 50 <= point["batch_size"] <= 500 for point in whole)


def test_trial_whose_worker_was_killed_while_it_entered_values_has_the_point_that_was_drawn(tmp_path):
    from optuna.trial import Trial

    study = study_in(tmp_path, SearchMethod.RANDOM)
    trial = study.ask()
    first = trial._suggest("lr", distributions(SPACE)["lr"])
    with open(tmp_path / "journal.log", "ab") as journal:
        journal.write(b'{"op_code": 5, "worker')  # a line that its writer was killed in
    again = study_in(tmp_path, SearchMethod.RANDOM)
    resumed = Trial(again, again.get_trials()[0]._trial_id)
    values = {name: resumed._suggest(name, distribution) for name, distribution in distributions(SPACE).items()}
    assert values == again.get_trials()[0].system_attrs["point"] and values["lr"] == first


def test_line_that_another_worker_had_no_room_for_is_not_appended_to(tmp_path):
    study = study_in(tmp_path, SearchMethod.RANDOM)
    study.ask()
    with open(tmp_path / "journal.log", "ab") as journal:
        journal.write(b'{"op_code": 5, "worker')
    study.ask()
    assert len(study_in(tmp_path, SearchMethod.RANDOM).get_trials()) == 2


def test_journal_that_is_none_is_a_sentence(tmp_path):
    (tmp_path / "journal.log").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="is not the journal of a search by Optuna"):
        study_in(tmp_path, SearchMethod.RANDOM)


class Trained:
    """In place of processes: trainings that write what a run writes, a validation at a time."""

    def __init__(self, accuracies: Callable[[int], list[float]]):
        self.accuracies, self.asked_to_stop, self.stopped, self.began = accuracies, False, False, 0

    def listen(self) -> None:
        pass

    def stop(self) -> None:
        self.stopped = True

    def train(self, run_dir: Path, options, output, look, look_every_s) -> int:
        self.stopped, self.began = False, self.began + 1
        run_dir.mkdir(parents=True)
        with open(run_dir / "metrics.jsonl", "w", buffering=1) as metrics:
            for step, accuracy in enumerate(self.accuracies(self.began), start=1):
                metrics.write(
                    to_json(MetricsRecord(kind="validation", step=step, accuracy=accuracy, elapsed_s=1.0)) + "\n"
                )
                look()
                if self.stopped:
                    (run_dir / "stopped.json").write_text("{}")
                    return 0
        output.write(b"error: the gradient is not finite\n")
        return 2


def search_in(folder: Path, method: SearchMethod, trials: int, prune: bool = False) -> Search:
    return Search(["lr=uniform:0:1"], folder, {"tensorboard": False}, method, trials, prune)


@pytest.mark.parametrize(("method", "prune"), [(SearchMethod.HALVING, False), (SearchMethod.RANDOM, True)])
def test_trials_that_fall_behind_are_pruned_and_others_are_not(method, prune, tmp_path):
    search = search_in(tmp_path, method, 8, prune)
    search.trainings = Trained(lambda number: [0.9, 0.9, 0.9, 0.9] if number <= 6 else [0.5, 0.5, 0.5, 0.5])
    search.run()
    states = {row.number: (row.state, row.validation_accuracy) for row in search.rows()}
    # The median rule begins with the sixth trial, and asks for complete ones, of which there are none here.
    pruned = {6: ("pruned", 0.5), 7: ("pruned", 0.5)} if method is SearchMethod.HALVING else {}
    assert states == {number: ("failed", 0.9 if number < 6 else 0.5) for number in range(8)} | pruned
    failed = next(row for row in search.rows() if row.state == "failed")
    assert failed.reason == "the gradient is not finite"


def test_worker_that_was_killed_between_a_decision_to_prune_and_the_end_prunes_that_trial_without_training(tmp_path):
    search = search_in(tmp_path, SearchMethod.HALVING, 1)
    with search._claimed() as trial:
        trial.report(0.5, 1)
        trial.set_user_attr("pruned_at", 1)
    again = search_in(tmp_path, SearchMethod.HALVING, 1)
    again.trainings = Trained(lambda number: [1.0])
    again.run()
    assert [(row.state, row.validation_accuracy) for row in again.rows()] == [
        ("pruned", 0.5)
    ] and not again.trainings.began


def test_trial_that_fails_on_a_full_disk_ends_the_search_and_is_resumed(tmp_path, monkeypatch):
    search = search_in(tmp_path, SearchMethod.RANDOM, 2, prune=True)
    search.trainings = Trained(lambda number: [0.5])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=12_000_000))
    with pytest.raises(UserError, match=r"a trial failed with only 12 MB of disk space free"):
        search.run()
    assert [row.state for row in search.rows()] == ["unfinished"] and search.trainings.began == 1
    monkeypatch.undo()
    shutil.rmtree(search.run_dir(0))
    search.run()
    assert [row.state for row in search.rows()] == ["failed", "failed"] and search.trainings.began == 3


def test_search_whose_log_is_on_a_full_disk_goes_on(tmp_path, monkeypatch):
    def write(text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    search = search_in(tmp_path, SearchMethod.RANDOM, 2, prune=True)
    search.trainings = Trained(lambda number: [0.5])
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=write))
    search.run()
    assert [row.state for row in search.rows()] == ["failed", "failed"]


def test_search_that_cannot_write_its_record_is_a_sentence(tmp_path, monkeypatch):
    def tell(study, *arguments, **more) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    search = search_in(tmp_path, SearchMethod.RANDOM, 1, prune=True)
    search.trainings = Trained(lambda number: [0.5])
    monkeypatch.setattr(search.study, "tell", tell)
    with pytest.raises(UserError, match=r"cannot continue .No space left on device.; fix the cause; the same"):
        search.run()


def test_search_without_a_finished_trial_is_an_error_also_with_fewer_trials_than_before(digits, tmp_path, monkeypatch):
    def train(self, run_dir: Path, options, output, look=None, look_every_s=None) -> int:
        return 0 if "--dry-run" in options else 1

    monkeypatch.setattr(Trainings, "listen", lambda self: None)
    monkeypatch.setattr(Trainings, "train", train)
    words = ("sweep", "lr=0.1", "lr=0.2", "--search=random", f"--data-dir={digits}", f"--run-dir={tmp_path}")
    for trials in (2, 1):
        done = dist_mnist(*words, "--no-tensorboard", f"--trials={trials}")
        assert done.returncode == 1 and "error: no trial finished, so there is no best" in done.stderr
        assert done.stdout.count("exit code 1") >= 2 and "unfinished" not in done.stdout


def test_table_of_a_search_is_there_though_files_of_a_trial_are_damaged(tmp_path):
    search = search_in(tmp_path, SearchMethod.RANDOM, 2, prune=True)
    search.trainings = Trained(lambda number: [0.5])
    search.run()
    for number, name in enumerate(("config.json", "metrics.jsonl")):
        (search.run_dir(number) / name).write_text('{"kind": 3}\n[\n')
    assert [(row.number, row.state) for row in search.rows()] == [(0, "failed"), (1, "failed")]
    assert _validations(search.run_dir(1)) == []


def rows_of(parent: Path) -> list[TrialRow]:
    """The trials in the journal, by number."""
    from optuna import load_study
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(parent / "search" / "journal.log")))
    return load_study(study_name="search", storage=storage).get_trials()


WORDS = ("--search=random", "lr=loguniform:0.02:0.3", "seed=0", "seed=1", "--steps=60", "--validate-every=20")


def test_killed_search_goes_on_with_two_workers_and_its_best_is_found_again_by_the_printed_command(digits, tmp_path):
    parent = tmp_path / "sweep"
    words = (*WORDS, "--trials=3", "--checkpoint-every=5", "--log-every=5", "max_restarts=0")
    process = sweep(digits, parent, *words)
    wait_for(lambda: list(parent.glob("trial-000/checkpoints/*.safetensors")), process)
    process.send_signal(signal.SIGKILL)
    workers = [sweep(digits, parent, *words) for _ in range(2)]
    done = [finish(worker) for worker in (process, *workers)]
    assert [code for code, *_ in done] == [-signal.SIGKILL, 0, 0], done
    trials = rows_of(parent)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert len({json.dumps(trial.params) for trial in trials}) == 3
    assert [path.name for path in sorted(parent.glob("trial-*"))] == ["trial-000", "trial-001", "trial-002"]
    out = max((out for _, out, _ in done), key=lambda text: text.count("%"))
    command = shlex.split(re.search("to repeat the best trial: (.*)", out)[1])
    best = max(trials, key=lambda trial: (trial.value, -trial.number))
    options = [word for word in command[2:] if not word.startswith(("--run-dir=", "--nproc", "--max-restarts"))]
    assert f"--lr={best.params['lr']!r}" in options
    again = train_here(digits, tmp_path / "again", *options)
    assert again.returncode == 0, again.stderr
    of_trial = RunDirectory(parent / f"trial-{best.number:03}")
    assert digest(RunDirectory(tmp_path / "again")) == digest(of_trial)


def test_failed_trial_does_not_end_the_search_and_another_search_in_its_folder_is_refused(digits, tmp_path):
    words = ("--search=random", "lr=1e30", "lr=0.1", "--steps=30", "--batch-norm=none")
    code, out, err = finish(sweep(digits, tmp_path, *words, "--trials=2", "max_restarts=0"))
    assert (code, err) == (0, ""), err
    assert sorted(trial.state.name for trial in rows_of(tmp_path)) == ["COMPLETE", "FAIL"]
    assert re.search("trial-00.: failed: .* training has diverged", out), out
    assert "to repeat the best trial: dist-mnist train" in out
    done = dist_mnist("sweep", "--search=tpe", *words[1:3], f"--run-dir={tmp_path}", "--trials=2", "--steps=31")
    assert done.returncode == 2 and "was started with other settings (--search=random -> --search=tpe; " in done.stderr
    assert "; --steps=30 -> --steps=31; " in done.stderr


def test_search_whose_check_failed_may_be_given_anew_with_other_settings(digits, tmp_path):
    words = ("--search=random", "lr=0.1", "lr=0.2", "--trials=1", "--steps=5")
    code, out, err = finish(sweep(digits, tmp_path, "crop=0", "crop=3", *words))
    assert code == 2 and "--crop 3 does not fit" in err and "nothing was started" in err
    code, out, err = finish(sweep(digits, tmp_path, *words))
    assert code == 0 and "to repeat the best trial: dist-mnist train" in out, err


@pytest.mark.parametrize(
    ("words", "others", "option"),
    [
        (["seed=1", "seed=2"], {"recipe": "sprint"}, ["--tensorboard"]),
        (["recipe=default", "recipe=fast"], {}, ["--tensorboard"]),
        (["seed=1", "seed=2"], {}, []),
        (["seed=1", "seed=2"], {"recipe": "sprint", "tensorboard": False}, ["--no-tensorboard"]),
    ],
    ids=str,
)
def test_sweeps_and_searches_write_for_tensorboard_unless_the_user_says_no(words, others, option, tmp_path):
    search = Search(words, tmp_path, {"validation_fraction": 0.1} | others, SearchMethod.RANDOM, 2)
    for options in (search.options, *Sweep(words, tmp_path, others).runs.values()):
        assert [one for one in options if "tensorboard" in one] == option
    assert search.draws == (option != ["--no-tensorboard"])
