"""Runs that start from the weights of another (--init), and that keep some of theirs (--freeze)."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from dist_mnist.data.idx import write_idx
from dist_mnist.run.checkpoints.file import evaluated_weights, load_checkpoint
from dist_mnist.run.directory import RunDirectory
from helpers.runs import SMALL, digest, dist_mnist, losses, train_here, trained_here

NORMS = "--batch-norm=all"


@pytest.fixture(scope="module")
def pretrained(digits, tmp_path_factory) -> Path:
    """A run with an EMA of its weights."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    return trained_here(digits, folder, NORMS, "--steps=10", "--ema-decay=0.9", "--seed=7")


@pytest.fixture
def refused(digits, tmp_path):
    """`refused(*options)` is the one sentence by which a run ends that makes no run directory."""

    def refused(*options: object, run_dir: Path = tmp_path / "refused") -> str:
        done = train_here(digits, run_dir, *options)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "refused").exists()
        return done.stderr

    return refused


def best(run_dir: Path) -> Path:
    return RunDirectory(run_dir).checkpoints.best().path


def last(run_dir: Path) -> dict[str, np.ndarray]:
    """The arrays of a run's last checkpoint."""
    return load_checkpoint(RunDirectory(run_dir).checkpoints.paths()[-1]).arrays


def init_of(run_dir: Path) -> dict:
    """What a run says it started from, which each of its checkpoints says as well."""
    recorded = json.loads((run_dir / "config.json").read_text())["init"]
    for path in RunDirectory(run_dir).checkpoints.paths():
        info = load_checkpoint(path).info.init
        assert info and (info.path, info.sha256) == (recorded["path"], recorded["sha256"])
    return recorded


def test_init_run_begins_with_its_weights_and_records_where_they_are_from(digits, pretrained, tmp_path):
    """Without a step that moves anything, what is saved is what was taken: the EMA of the best checkpoint."""
    run = trained_here(digits, tmp_path / "run", NORMS, "--steps=1", "--lr=0", f"--init={pretrained}")
    expected, found = evaluated_weights(load_checkpoint(best(pretrained)).arrays), evaluated_weights(last(run))
    parameters = [name for name in expected if name.endswith(("weight", "bias"))]
    assert len(parameters) == 11 and all(np.array_equal(found[name], expected[name]) for name in parameters)
    assert init_of(run) == {"path": str(best(pretrained)), "sha256": sha256(best(pretrained).read_bytes()).hexdigest()}
    shown = json.loads(dist_mnist("ckpt", "show", best(run)).stdout)
    assert shown["init"] == init_of(run)


def test_init_says_what_was_taken_and_a_run_of_its_own_is_named_by_it(digits, pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = (*SMALL, NORMS, f"--data-dir={digits}", "--steps=1")
    names = [dist_mnist("train", *options, *more, "--dry-run").stdout for more in ((), (f"--init={pretrained}",))]
    assert names[0] != names[1]
    done = train_here(digits, tmp_path / "run", *SMALL, NORMS, "--steps=1", f"--init={pretrained}", "--freeze=stages.*")
    assert f"init      20 of 20 tensors (100.0% of the numbers) from {best(pretrained)}\n" in done.stdout
    assert "% of the parameters, and the running statistics of 2 layers\n" in done.stdout


def test_init_on_data_of_fewer_classes_begins_with_a_fresh_head(digits, pretrained, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 100), ("t10k", 20)):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 3)
    done = train_here(tmp_path, tmp_path / "run", *SMALL, NORMS, "--steps=1", f"--init={pretrained}")
    assert done.returncode == 0, done.stderr
    assert "          head.weight: 10 classes in the file, 3 here: newly initialised\n" in done.stdout


def test_init_from_an_exported_file_is_that_from_the_run(digits, pretrained, tmp_path):
    file = tmp_path / "network.safetensors"
    exported = dist_mnist("export", "--ckpt", pretrained, "--format=safetensors", f"--output={file}")
    assert exported.returncode == 0, exported.stderr
    plain = {f"module.{name}": tensor for name, tensor in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(plain, tmp_path / "plain.safetensors")
    runs = [
        trained_here(digits, tmp_path / f"run-{source.name}", NORMS, "--steps=3", f"--init={source}")
        for source in (pretrained, file, tmp_path / "plain.safetensors")
    ]
    assert len({digest(RunDirectory(run)) for run in runs}) == 1
    assert init_of(runs[1])["sha256"] == sha256(file.read_bytes()).hexdigest()


def test_init_run_resumes_without_the_file_to_the_same_bits(digits, pretrained, tmp_path):
    file = Path(shutil.copy(best(pretrained), tmp_path / "start.safetensors"))
    options = (NORMS, "--steps=12", "--checkpoint-every=4", f"--init={file}", "--freeze=stages.0.*", "--ema-decay=0.9")
    run = trained_here(digits, tmp_path / "run", *options)
    shutil.copytree(run, tmp_path / "again")
    interrupted = RunDirectory(tmp_path / "again")
    for path in (*interrupted.checkpoints.paths()[1:], interrupted.result_path):
        path.unlink()
    file.unlink()
    done = train_here(digits, tmp_path / "again", *SMALL, *options)
    assert "resume    after step 4\n" in done.stdout and not done.stderr
    assert digest(interrupted) == digest(RunDirectory(run)) and init_of(interrupted.path) == init_of(run)


def test_init_file_that_has_changed_is_told_on_resume(digits, pretrained, tmp_path):
    file = Path(shutil.copy(best(pretrained), tmp_path / "start.safetensors"))
    run = trained_here(digits, tmp_path / "run", NORMS, "--steps=1", f"--init={file}")
    safetensors.torch.save_file({"head.bias": torch.zeros(10)}, file)
    done = train_here(digits, run, *SMALL, NORMS, "--steps=1", f"--init={file}")
    assert done.returncode == 0 and "finished" in done.stdout
    assert done.stderr == (
        f"warning: --init {file} has changed since the run in {run} started from it; the run resumes from its own "
        "checkpoint: to start from the changed file, give another --run-dir\n"
    )


def test_resume_with_another_init_or_none_is_refused(digits, pretrained, tmp_path, refused):
    other = shutil.copy(best(pretrained), tmp_path / "other.safetensors")
    run = trained_here(digits, tmp_path / "run", NORMS, "--steps=1", f"--init={pretrained}")
    assert f"init: {pretrained} -> {other}" in refused(*SMALL, NORMS, "--steps=1", f"--init={other}", run_dir=run)
    assert "freeze:  -> head.*" in refused(*SMALL, NORMS, "--steps=1", "--freeze=head.*", run_dir=run)
    fresh = trained_here(digits, tmp_path / "fresh", NORMS, "--steps=1")
    assert f"init: None -> {other}" in refused(*SMALL, NORMS, "--steps=1", f"--init={other}", run_dir=fresh)


def test_init_run_whose_only_checkpoint_is_damaged_begins_anew(digits, pretrained, tmp_path):
    run = trained_here(digits, tmp_path / "run", NORMS, "--steps=2", f"--init={pretrained}")
    weights = digest(RunDirectory(run))
    path = best(run)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    done = train_here(digits, run, *SMALL, NORMS, "--steps=2", f"--init={pretrained}")
    assert done.returncode == 2 and "give the same command again, which starts the run anew" in done.stderr
    assert digest(RunDirectory(trained_here(digits, run, NORMS, "--steps=2", f"--init={pretrained}"))) == weights


def test_init_of_what_is_missing_or_none_makes_no_run_directory(pretrained, tmp_path, refused):
    assert "there is no such file or run directory" in refused(f"--init={tmp_path / 'absent'}")
    torch.save({"head.bias": torch.zeros(10)}, tmp_path / "weights.pt")
    assert "convert them with safetensors.torch.save_file" in refused(f"--init={tmp_path / 'weights.pt'}")
    assert "none of its tensors fits the network" in refused(f"--init={pretrained}", "--model=mlp")
    assert "leaves no parameter to train" in refused(f"--init={pretrained}", "--freeze=*")
    assert "--freeze body.* matches no parameter" in refused(f"--init={pretrained}", "--freeze=body.*")


def test_init_that_is_missing_is_refused_before_processes_start(digits, tmp_path):
    done = dist_mnist("train", f"--data-dir={digits}", f"--run-dir={tmp_path / 'run'}", "--init=absent")
    assert done.returncode == 2 and done.stderr == "error: --init absent: there is no such file or run directory\n"
    assert not (tmp_path / "run").exists()


IN_A_FOLDER_OF_ITS_OWN = """
import os, runpy
os.chdir(f"node{os.environ['RANK']}")
runpy.run_module("dist_mnist.train", run_name="__main__")
"""


def test_init_file_that_is_another_on_a_rank_is_named(run, digits, pretrained, tmp_path, monkeypatch):
    """A relative path, as on nodes that do not share a disk."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(IN_A_FOLDER_OF_ITS_OWN)
    for rank in (0, 1):
        Path(f"node{rank}").mkdir()
        file = Path(shutil.copy(best(pretrained), f"node{rank}/start.safetensors"))
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({"head.bias": tensors["average/head.bias"]}, file)
    options = (f"--data-dir={digits}", f"--run-dir={tmp_path / 'run'}", "--device=cpu", "--init=start.safetensors")
    done = run(2, "train.py", *options, *SMALL, NORMS, "--steps=1")
    assert done.returncode != 0 and not list((tmp_path / "run/checkpoints").iterdir())
    assert "error: rank 1 and rank 0 differ in their network: --init file " in done.stderr
    assert sha256(file.read_bytes()).hexdigest() in done.stderr


FROZEN = "stages.*"
WAYS = {
    "sgd": ("--weight-decay=0.1",),
    "ema": ("--ema-decay=0.9", "--weight-decay=0.1", "--optimizer=adamw", "--clip-norm=1"),
    "adversarial": ("--adversarial=0.1", "--accumulate=2"),
    "invariant": ("--invariant", "--microbatches=4", "--weight-decay=0.1", "--ema-decay=0.9"),
}


def check_frozen(run: Path, pretrained: Path) -> None:
    """All of the frozen stages is as it was, bit for bit, also in the EMA; all else has moved."""
    before, after = evaluated_weights(load_checkpoint(best(pretrained)).arrays), last(run)
    assert not [name for name in after if name.startswith("optimizer/") and "stages" in name]
    weights = [name for name in after if name.startswith(("model/", "average/")) and "pixel" not in name]
    same = [name for name in weights if np.array_equal(after[name], before[name.partition("/")[2]])]
    assert same == [name for name in weights if "/stages." in name] and len(same) >= 12


@pytest.mark.parametrize("way", WAYS)
def test_freeze_keeps_parameters_and_running_statistics_bit_for_bit(digits, pretrained, tmp_path, way):
    options = (NORMS, f"--init={pretrained}", f"--freeze={FROZEN}", "--steps=4", *WAYS[way])
    check_frozen(trained_here(digits, tmp_path / "run", *options), pretrained)


def test_init_and_freeze_two_processes_agree_with_one(train, digits, pretrained, tmp_path):
    options = (*SMALL, NORMS, f"--init={pretrained}", f"--freeze={FROZEN}", "--steps=4", "--log-every=1")
    trained_here(digits, tmp_path / "one", *options)
    train(2, tmp_path / "two", *options)
    check_frozen(tmp_path / "two", pretrained)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-3)
    assert init_of(tmp_path / "two") == init_of(tmp_path / "one")


def test_init_invariant_two_processes_have_the_bits_of_one(train, digits, pretrained, tmp_path):
    options = (*SMALL, NORMS, f"--init={pretrained}", f"--freeze={FROZEN}", "--steps=4", *WAYS["invariant"])
    trained_here(digits, tmp_path / "one", *options)
    train(2, tmp_path / "two", *options)
    assert digest(RunDirectory(tmp_path / "two")) == digest(RunDirectory(tmp_path / "one"))
