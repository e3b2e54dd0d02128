"""Whole runs with real processes over gloo: what they write, and that they do not depend on how many there are."""

import json
import os
import signal

import numpy as np
import pytest

from dist_mnist.data.idx import write_idx
from dist_mnist.run.directory import RunDirectory
from helpers.runs import digest, dist_mnist, losses, records, train_here, trained_here, wait_for

# 600 images of which 60 are held out: 540 in batches of 100, the last one of 40, which neither 3 nor 7 divides.
SETTINGS = ("--batch-size=100", "--log-every=1", "--lr=0.02", "--threads=1")
EXACT = ("--precision=fp32", "--steps=14")


def alone(data, run_dir, *options):
    """A run of one process, within this one; it has to succeed."""
    done = train_here(data, run_dir, *SETTINGS, *options)
    assert done.returncode == 0, done.stderr
    return done


def test_checkpoint_by_the_clock_does_not_wait_for_a_log_line(digits, tmp_path):
    options = ("--steps=6", "--log-every=1000", "--validation-fraction=0", "--checkpoint-every-s=0.001", "--keep=100")
    run = RunDirectory(trained_here(digits, tmp_path / "run", *options))
    assert run.checkpoints.paths() == [run.checkpoints.path(step) for step in range(1, 7)]
    assert [record["step"] for record in records(run.path, "train")] == [6]


@pytest.mark.quick
def test_train_eval_and_predict_two_processes_agree_with_what_the_run_directory_holds(train, digits, tmp_path):
    done = train(2, tmp_path / "run", *SETTINGS, "--epochs=1", "--tensorboard")
    result = json.loads((tmp_path / "run/result.json").read_text())
    confusion = np.array(result["confusion_matrix"])
    assert result["split"] == "test" and result["step"] == 6 and result["images"] == confusion.sum() == 200
    assert result["correct"] == confusion.trace() and result["accuracy"] == result["correct"] / 200
    assert f"{result['accuracy']:.2%}" in done.stdout
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records(tmp_path / "run", "validation")] == [6]
    assert len(list((tmp_path / "run/tensorboard").glob("events.*"))) == 1
    assert json.loads((tmp_path / "run/config.json").read_text())["settings"]["batch_size"] == 100
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock", "chain.jsonl", "config.json", "checkpoints", "tensorboard", "metrics.jsonl", "result.json",
    }  # fmt: skip

    assert result.pop("ended") == "length"
    seconds = result.pop("seconds")  # are the run's, not those of an evaluation
    assert 0 < seconds["training"] < seconds["training_with_evaluation"] < seconds["since_start"]
    assert f"training {seconds['training']:.2f} s" in done.stdout

    of_run = ("--ckpt", tmp_path / "run", "--json", "--device=cpu")
    assert json.loads(dist_mnist("eval", *of_run).stdout) == result  # with another number of threads than in training
    validation = json.loads(dist_mnist("eval", *of_run, "--split=validation").stdout)
    judged = records(tmp_path / "run", "validation")[0]
    assert validation["images"] == 60 and validation["accuracy"] == judged["accuracy"]
    assert validation["loss"] == pytest.approx(judged["loss"], rel=1e-5)
    predicted = json.loads(dist_mnist("predict", digits / "t10k-images-idx3-ubyte", *of_run).stdout)
    assert np.bincount([one["class"] for one in predicted], minlength=10).tolist() == confusion.sum(axis=0).tolist()

    again = train(2, tmp_path / "run", *SETTINGS, "--epochs=1")
    assert "finished" in again.stdout
    assert json.loads((tmp_path / "run/result.json").read_text()) == result | {"seconds": None, "ended": "length"}
    assert len(records(tmp_path / "run", "train")) == 6


PLAIN = ("--batch-norm=none", "--dropout=0", "--rotate=0", "--scale=0", "--shift=0")
MIXED = ("--erasing=0.3", "--mixup=0.2", "--cutmix=1", "--mixup-prob=0.5")
SLOWLY = ("--batch-norm=all", "--dropout=0.4", "--rotate=15", "--lr=0.002", *MIXED)


# Rounding differs with the number of processes, and training amplifies it: with batch normalisation on batches of 100
# by ten or twenty a step at a rate of 0.02, so that is compared early, at a lower one.
@pytest.mark.quick
@pytest.mark.parametrize(
    ("model", "nproc", "compared", "tolerance"), [(PLAIN, 2, 14, 2e-3), (SLOWLY, 3, 4, 1e-3)], ids=["plain", "random"]
)
def test_losses_several_processes_are_those_of_one(model, nproc, compared, tolerance, train, digits, tmp_path):
    alone(digits, tmp_path / "one", *EXACT, *model)
    train(nproc, tmp_path / "several", *SETTINGS, *EXACT, *model)
    one, several = losses(tmp_path / "one"), losses(tmp_path / "several")
    assert len(one) == 14 and one[-1] < 0.8 * one[0]
    np.testing.assert_allclose(several[:compared], one[:compared], rtol=tolerance)
    assert several[0] == pytest.approx(one[0], rel=2e-5)


def test_losses_accumulated_batches_are_those_of_whole_ones(train, digits, tmp_path):
    options = (*EXACT, *PLAIN, "--dropout=0.4", "--steps=6")
    alone(digits, tmp_path / "whole", *options)
    train(2, tmp_path / "parts", *SETTINGS, *options, "--accumulate=3")
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=2e-3)


@pytest.mark.quick
def test_run_killed_in_mid_epoch_resumes_to_the_same_bits(train, launch, digits, tmp_path):
    """Killed within the second epoch, after a checkpoint in mid-epoch, with everything on that draws at random."""
    drawn = (*SETTINGS, *MIXED, "--rotate=15", "--ema-decay=0.9", "--optimizer=adamw")
    options = (*drawn, "--steps=16", "--checkpoint-every=4")
    train(2, tmp_path / "undisturbed", *options)

    settings = (f"--data-dir={digits}", "--device=cpu", "--no-tensorboard", f"--run-dir={tmp_path / 'killed'}")
    first = launch(2, "-m", "dist_mnist.train", *settings, *options)
    checkpoint = RunDirectory(tmp_path / "killed").checkpoints.path(8)
    wait_for(lambda: checkpoint.exists() or first.poll() is not None)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = train(2, tmp_path / "killed", *options)

    assert "resume    after step" in done.stdout or "finished" in done.stdout
    assert digest(RunDirectory(tmp_path / "killed")) == digest(RunDirectory(tmp_path / "undisturbed"))
    assert [record["step"] for record in records(tmp_path / "killed", "train")] == list(range(1, 17))
    np.testing.assert_array_equal(losses(tmp_path / "killed"), losses(tmp_path / "undisturbed"))


def test_resume_with_other_settings_is_refused(digits, tmp_path):
    alone(digits, tmp_path / "run", "--steps=2")
    weights = digest(RunDirectory(tmp_path / "run"))
    refused = train_here(digits, tmp_path / "run", "--lr=0.5")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1 and "lr: 0.02 -> 0.5" in refused.stderr
    assert digest(RunDirectory(tmp_path / "run")) == weights


def test_ranks_given_a_missing_folder_say_so_once(run, digits, tmp_path):
    done = run(2, "-m", "dist_mnist.train", f"--data-dir={tmp_path / 'nowhere'}", f"--run-dir={tmp_path / 'run'}")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "does not exist" in done.stderr
    assert not (tmp_path / "run").exists()


def test_eval_several_checkpoints_averages_their_probabilities(digits, tmp_path):
    for seed in (1, 2):
        alone(digits, tmp_path / str(seed), "--steps=6", f"--seed={seed}")
    result = json.loads(dist_mnist("eval", "--ckpt", tmp_path / "1", "--ckpt", tmp_path / "2", "--json").stdout)
    single = [json.loads((tmp_path / seed / "result.json").read_text()) for seed in "12"]
    assert result["images"] == 200 and result["step"] == [6, 6]
    assert result["loss"] < np.mean([one["loss"] for one in single])  # the mean of probabilities: Jensen's inequality


def test_network_on_colour_images_of_another_size_adapts_to_them(tmp_path):
    """Colour images that are not square, in big-endian 16-bit numbers, in three classes told apart by their colour."""
    folder = tmp_path / "colours"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 300), ("test", 90)):
        labels = rng.integers(0, 3, count).astype(np.int32)
        images = rng.integers(0, 300, (count, 10, 14, 3)).astype(np.int16)
        images[np.arange(count), :, :, labels] += 200
        write_idx(folder / f"{split}-images-idx4-short", images)
        write_idx(folder / f"{split}-labels-idx1-int", labels)
    alone(folder, tmp_path / "run", "--steps=12", "--conv-channels=8,8")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert len(result["confusion_matrix"]) == 3 and result["images"] == 90
    assert result["accuracy"] > 0.8


def test_weights_with_images_in_device_memory_are_the_same(digits, tmp_path):
    for where in ("yes", "no"):
        alone(digits, tmp_path / where, "--steps=3", f"--data-on-device={where}")
    assert digest(RunDirectory(tmp_path / "yes")) == digest(RunDirectory(tmp_path / "no"))


def test_notebook_recipe_on_raw_pixels_learns(digits, tmp_path):
    """Glorot-uniform weights on pixels up to 255 begin with a loss of tens, as the notebook's log shows (47.8)."""
    alone(digits, tmp_path / "raw", "--recipe=notebook", "--lr=0.001", "--steps=30")
    alone(digits, tmp_path / "unit", "--recipe=notebook", "--lr=0.001", "--steps=1", "--pixels=unit")
    raw, unit = losses(tmp_path / "raw"), losses(tmp_path / "unit")
    assert raw[0] > 10 and np.mean(raw[-5:]) < 0.3 * raw[0]
    assert unit[0] == pytest.approx(np.log(10), abs=0.3)


def test_run_directory_of_another_run_at_work_is_refused(run, digits, tmp_path):
    with RunDirectory(tmp_path / "run").owned():
        refused = run(1, "-m", "dist_mnist.train", f"--data-dir={digits}", f"--run-dir={tmp_path / 'run'}")
    assert refused.returncode == 2 and "another run is using this folder" in refused.stderr
    alone(digits, tmp_path / "run", "--steps=2")
