"""Whole runs with real processes over gloo: what they write, and that they do not depend on how many there are."""

import json
import os
import signal
import time

import numpy as np
import pytest

from dist_mnist.data.idx import write_idx
from dist_mnist.run.directory import RunDirectory
from helpers.runs import digest, losses, records

# 600 images of which 60 are held out: 540 in batches of 100, the last one of 40, which neither 3 nor 7 divides.
SETTINGS = ("--batch-size=100", "--log-every=1", "--lr=0.02", "--threads=1")
EXACT = ("--precision=fp32", "--steps=14")


def test_a_run_writes_what_its_directory_promises(train, run, digits, tmp_path):
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
        ".lock", "config.json", "checkpoints", "tensorboard", "metrics.jsonl", "result.json",
    }  # fmt: skip

    command = ("-m", "dist_mnist", "eval", "--ckpt", tmp_path / "run", "--json", "--device=cpu")
    assert json.loads(run(1, *command).stdout) == result  # with another number of threads than in training
    validation = json.loads(run(1, *command, "--split=validation").stdout)
    judged = records(tmp_path / "run", "validation")[0]
    assert validation["images"] == 60 and validation["accuracy"] == judged["accuracy"]
    assert validation["loss"] == pytest.approx(judged["loss"], rel=1e-5)

    again = train(2, tmp_path / "run", *SETTINGS, "--epochs=1")
    assert "finished" in again.stdout
    assert json.loads((tmp_path / "run/result.json").read_text()) == result
    assert len(records(tmp_path / "run", "train")) == 6


PLAIN = ("--batch-norm=none", "--dropout=0", "--rotate=0", "--scale=0", "--shift=0")
RANDOM = ("--batch-norm=all", "--dropout=0.4", "--rotate=15")


# Rounding differs with the number of processes, and training amplifies it: with batch normalisation on batches of 100,
# a change of the initial weights by 1e-6 alone moves the loss by 1e-3 after four steps. So that is compared early.
@pytest.mark.parametrize(("model", "compared", "tolerance"), [(PLAIN, 14, 2e-3), (RANDOM, 3, 1e-3)])
def test_the_loss_curve_is_the_same_for_any_number_of_processes(model, compared, tolerance, train, tmp_path):
    several = (2, 3) if model == PLAIN else (3,)
    for nproc in (1, *several):
        train(nproc, tmp_path / str(nproc), *SETTINGS, *EXACT, *model)
    alone = losses(tmp_path / "1")
    assert len(alone) == 14 and alone[-1] < 0.8 * alone[0]
    for nproc in several:
        together = losses(tmp_path / str(nproc))
        np.testing.assert_allclose(together[:compared], alone[:compared], rtol=tolerance)
        assert together[0] == pytest.approx(alone[0], rel=2e-5)


def test_accumulation_changes_nothing(train, tmp_path):
    options = (*SETTINGS, *EXACT, *PLAIN, "--dropout=0.4", "--steps=6")
    train(1, tmp_path / "whole", *options)
    train(2, tmp_path / "parts", *options, "--accumulate=3")
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=2e-3)


def test_a_killed_run_ends_with_the_same_bits(train, launch, digits, tmp_path):
    """Killed within the second epoch, after a checkpoint in mid-epoch, with everything on that draws at random."""
    options = (*SETTINGS, "--steps=16", "--checkpoint-every=4", "--rotate=15", "--ema-decay=0.9", "--optimizer=adamw")
    train(2, tmp_path / "undisturbed", *options)

    settings = (f"--data-dir={digits}", "--device=cpu", "--no-tensorboard", f"--run-dir={tmp_path / 'killed'}")
    first = launch(2, "-m", "dist_mnist.train", *settings, *options)
    checkpoint = RunDirectory(tmp_path / "killed").checkpoints.path(8)
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.002)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait(timeout=20)
    done = train(2, tmp_path / "killed", *options)

    assert "resume    after step" in done.stdout or "finished" in done.stdout
    assert digest(RunDirectory(tmp_path / "killed")) == digest(RunDirectory(tmp_path / "undisturbed"))
    assert [record["step"] for record in records(tmp_path / "killed", "train")] == list(range(1, 17))
    np.testing.assert_array_equal(losses(tmp_path / "killed"), losses(tmp_path / "undisturbed"))


def test_other_settings_do_not_continue_a_run(train, run, digits, tmp_path):
    train(1, tmp_path / "run", *SETTINGS, "--steps=2")
    weights = digest(RunDirectory(tmp_path / "run"))
    refused = run(1, "-m", "dist_mnist.train", f"--data-dir={digits}", f"--run-dir={tmp_path / 'run'}", "--lr=0.5")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1 and "lr: 0.02 -> 0.5" in refused.stderr
    assert digest(RunDirectory(tmp_path / "run")) == weights


def test_torchrun_tells_a_users_mistake_once(run, digits, tmp_path):
    done = run(2, "-m", "dist_mnist.train", f"--data-dir={tmp_path / 'nowhere'}", f"--run-dir={tmp_path / 'run'}")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "there is no such folder" in done.stderr
    assert not (tmp_path / "run").exists()


def test_several_checkpoints_are_averaged(train, run, tmp_path):
    for seed in (1, 2):
        train(1, tmp_path / str(seed), *SETTINGS, "--steps=6", f"--seed={seed}")
    command = ("-m", "dist_mnist", "eval", "--ckpt", tmp_path / "1", "--ckpt", tmp_path / "2", "--json")
    result = json.loads(run(1, *command).stdout)
    single = [json.loads((tmp_path / seed / "result.json").read_text()) for seed in "12"]
    assert result["images"] == 200 and result["step"] == [6, 6]
    assert result["loss"] < np.mean([one["loss"] for one in single])  # the mean of probabilities: Jensen's inequality


def test_the_network_adapts_to_the_files(train, run, tmp_path):
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
    train(2, tmp_path / "run", *SETTINGS, "--steps=12", "--conv-channels=8,8", f"--data-dir={folder}")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert len(result["confusion_matrix"]) == 3 and result["images"] == 90
    assert result["accuracy"] > 0.8


def test_images_kept_in_device_memory_change_nothing(train, tmp_path):
    for where in ("yes", "no"):
        train(1, tmp_path / where, *SETTINGS, "--steps=3", f"--data-on-device={where}")
    assert digest(RunDirectory(tmp_path / "yes")) == digest(RunDirectory(tmp_path / "no"))


def test_the_notebooks_recipe_trains_on_raw_pixels(train, tmp_path):
    """Glorot-uniform weights on pixels up to 255 begin with a loss of tens, as the notebook's log shows (47.8)."""
    train(1, tmp_path / "raw", *SETTINGS, "--recipe=notebook", "--lr=0.001", "--steps=40")
    train(1, tmp_path / "unit", *SETTINGS, "--recipe=notebook", "--lr=0.001", "--steps=1", "--pixels=unit")
    raw, unit = losses(tmp_path / "raw"), losses(tmp_path / "unit")
    assert raw[0] > 10 and np.mean(raw[-5:]) < 0.3 * raw[0]
    assert unit[0] == pytest.approx(np.log(10), abs=0.3)


def test_a_second_run_does_not_write_into_the_folder_of_the_first(run, digits, tmp_path):
    options = (f"--data-dir={digits}", f"--run-dir={tmp_path / 'run'}", "--device=cpu", "--steps=2")
    with RunDirectory(tmp_path / "run").owned():
        refused = run(1, "-m", "dist_mnist.train", *options)
    assert refused.returncode == 2 and "another run is at work" in refused.stderr
    assert run(1, "-m", "dist_mnist.train", *options).returncode == 0
