"""The batch scripts, submitted to a real Slurm: on two nodes they train, are preempted, run out of time, and go on."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_mnist.run.directory import RunDirectory
from helpers import HANGS_AFTER_S, networks
from helpers.runs import SMALL, digest, reaches
from helpers.slurm import Login

pytestmark = pytest.mark.xdist_group("slurm")  # of one process, so that there is one cluster
ROOT = Path(__file__).resolve().parents[2]
TRAIN = "slurm/train.sh"
# Learning rates that do not depend on the length: a run that is ended at any step can be held against a shorter one.
EXACT = ("--invariant", "--microbatches=4", "--checkpoint-every=20", "--schedule=constant", "--warmup-fraction=0")
ENDLESS = (*EXACT, "--steps=1000000")


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """The run directory of these tests."""
    return RunDirectory(tmp_path / "runs" / "run")


@pytest.fixture
def settings(digits, run) -> tuple[str, ...]:
    """Options of training: a small network on small data, two processes on each node."""
    return ("--nproc=2", f"--data-dir={digits}", f"--run-dir={run.path}", *SMALL)


def undisturbed(folder: Path, digits: Path, steps: int, *more: str) -> str:
    """The digest of a run of one process that nothing happens to."""
    run = RunDirectory(folder)
    options = (f"--data-dir={digits}", f"--run-dir={run.path}", *SMALL, *EXACT, f"--steps={steps}", *more)
    subprocess.run(
        [sys.executable, "-m", "dist_mnist.train", *options], check=True, capture_output=True, timeout=HANGS_AFTER_S
    )
    return digest(run)


def check_readable(log: str) -> None:
    """No traces, no banners, no warnings of others' software."""
    assert not re.search(r"Traceback|\[[WE]\d{3}|\bW\d{4}\b|\bE\d{4}\b|OMP_NUM_THREADS|FutureWarning|\*{5}", log), log


def test_train_script_on_two_nodes_trains_to_a_result(login: Login, settings, run):
    job = login.sbatch("--nodes=2", "--gpus-per-node=2", TRAIN, *settings, "--steps=40")
    assert login.ends(job) == ("COMPLETED", "0:0"), login.said(job)
    said = login.said(job)
    assert "40 steps of 50 images on 4 processes on CPU" in said and said.count("test accuracy") == 1
    check_readable(said)
    assert json.loads(run.result_path.read_text())["step"] == 40
    logs = {path.name: path.read_text() for path in (run.path / "logs").iterdir()}
    assert logs.keys() == {f"{job}-n1.log", f"{job}-n2.log"}
    assert sum("test accuracy" in log for log in logs.values()) == 1, "rank 0 speaks, and nobody else"

    job = login.sbatch("slurm/eval.sh", "--ckpt", run.path, "--json")
    assert login.ends(job) == ("COMPLETED", "0:0"), login.said(job)
    result = json.loads(run.result_path.read_text())
    assert json.loads(login.said(job)) == {name: result[name] for name in result.keys() - {"seconds", "ended"}}


def test_scripts_given_an_image_run_in_it_on_every_node(login: Login, settings, run, tmp_path):
    log, apptainer = tmp_path / "apptainer.log", tmp_path / "bin" / "apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text(  # a stand-in that runs here what it is to run in the image
        f'#!/bin/sh\necho "$SLURMD_NODENAME $*" >>{log}\nwhile [ "$1" != my.sif ]; do shift; done\nshift 2\n'
        f'PYTHONPATH={ROOT} exec {sys.executable} -m dist_mnist "$@"\n'
    )
    apptainer.chmod(0o755)
    (login.root / "launch" / "setup.sh").write_text("exit 9\n")
    image = f"--export=ALL,DIST_MNIST_IMAGE=my.sif,PATH={apptainer.parent}:{os.environ['PATH']}"
    job = login.sbatch("--nodes=2", image, TRAIN, *settings, "--nproc=1", "--steps=2")
    assert login.ends(job) == ("COMPLETED", "0:0"), login.said(job)
    assert "2 steps of 50 images on 2 processes on CPU" in login.said(job)
    check_readable(login.said(job))
    calls = log.read_text()
    assert calls.count(f" exec --bind {login.root} my.sif dist-mnist train --nnodes=2") == 2, calls
    assert all(f"{node} exec" in calls for node in ("n1", "n2")) and "dist-mnist rendezvous" in calls

    job = login.sbatch(image, "slurm/eval.sh", "--ckpt", run.path, "--json")
    assert login.ends(job) == ("COMPLETED", "0:0"), login.said(job)
    assert json.loads(login.said(job))["step"] == 2


def test_job_preempted_requeued_and_cancelled_keeps_its_bits(login: Login, settings, run, digits, tmp_path):
    job = login.sbatch("--nodes=2", TRAIN, *settings, *ENDLESS)
    login.wait_for(job, reaches(run, 30))
    login.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    login.starts_again(job)
    at = int(re.search(r"stopped   after step (\d+), and saved", login.said(job))[1])
    login.wait_for(job, reaches(run, at + 30))
    login.slurm.run("scancel", job)
    state, _ = login.ends(job)
    said = login.said(job)
    assert (
        state == "CANCELLED" and f"  sbatch [...] slurm/train.sh --nproc=2 --data-dir={digits}" in said.splitlines()[-1]
    )
    assert f"resume    after step {at}\n" in said
    check_readable(said)
    stopped = json.loads(run.stopped_path.read_text())
    assert stopped["step"] > at + 29 and f"stopped   after step {stopped['step']}, and saved" in said
    assert digest(run) == undisturbed(tmp_path / "undisturbed", digits, stopped["step"])


def test_job_at_its_time_limit_saves_and_resumes(login: Login, settings, run):
    job = login.sbatch("--nodes=2", "--time=2", "--signal=B:USR1@10", TRAIN, *settings, *ENDLESS)
    login.starts_again(job)
    said = login.said(job)
    at = int(re.search(r"stopped   after step (\d+), and saved", said)[1])
    assert f"job {job} is requeued, to resume from step-{at:08}" in said
    # What a node has said comes to the job's log later than its progress to the run directory.
    login.wait_for(job, lambda: f"resume    after step {at}\n" in login.said(job))
    login.wait_for(job, reaches(run, at + 1))


def test_job_that_loses_a_node_resumes_from_its_checkpoint(login: Login, settings, run):
    job = login.sbatch("--nodes=2", TRAIN, *settings, *ENDLESS)
    login.wait_for(job, reaches(run, 30))
    login.slurm.nodes["n2"].link("down")
    try:
        login.wait_for(job, lambda: login.state(job) != "RUNNING", "the loss was not noticed")
    finally:
        login.slurm.nodes["n2"].link("up")
    login.starts_again(job)
    login.wait_for(job, lambda: "start 2, on n[1-2]" in login.said(job))
    at = int(run.checkpoints.paths()[-1].stem.removeprefix("step-"))
    # Only then does the progress that is read belong to this start: the first one was lost, and left its own behind.
    login.wait_for(job, lambda: f"resume    after step {at}\n" in login.said(job))
    login.wait_for(job, reaches(run, at + 10))


def test_job_that_may_not_be_requeued_says_how_to_resume(login: Login, settings, run):
    job = login.sbatch("--no-requeue", TRAIN, *settings, *ENDLESS)
    login.wait_for(job, reaches(run, 10))
    login.slurm.run("scancel", "--signal=USR1", job)
    assert login.ends(job) == ("FAILED", "75:0")
    assert (
        "does not let the job requeue itself; resume with:\n  sbatch [...] slurm/train.sh --nproc=2 --data-dir="
        in login.said(job)
    )
    assert run.checkpoints.path(json.loads(run.stopped_path.read_text())["step"]).exists()


def test_job_whose_start_made_no_progress_is_not_requeued(login: Login, settings):
    job = login.sbatch(TRAIN, *settings, *ENDLESS)
    login.wait_for(job, lambda: f"job {job}, start 1" in login.said(job))  # it listens, and has not begun to train
    login.slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert login.ends(job) == ("FAILED", "75:0")
    assert "this start saved no new checkpoint, so the job is not requeued" in login.said(job)
    assert login.slurm.fact(job, "Restarts") == "0"


def test_jobs_at_once_on_the_same_nodes_end_with_the_same_bits(login: Login, settings, run, digits):
    runs = [RunDirectory(run.path.with_name(name)) for name in ("one", "other")]
    options = [(*settings, f"--run-dir={one.path}", "--steps=300", *EXACT) for one in runs]
    jobs = [login.sbatch("--nodes=2", TRAIN, *words) for words in options]
    login.wait_for(jobs[1], lambda: all(one.progress_path.exists() for one in runs), "they did not run at once")
    assert [login.ends(job) for job in jobs] == [("COMPLETED", "0:0")] * 2
    assert digest(runs[0]) == digest(runs[1])


def test_sweep_script_trains_every_combination(login: Login, digits):
    settings = (f"--data-dir={digits}", *SMALL, "--steps=20", "--seed=9")  # what is combined wins over it
    sbatch = ("bash", "slurm/sweep.sh", "--parsable", "seed=0", "seed=1", "seed=2")
    said = login.slurm.run(*sbatch, *settings, cwd=login.root)
    login.jobs.append(array := said.splitlines()[-1])
    folders = [Path("runs/sweep") / f"seed={seed}" for seed in range(3)]
    assert [line.split() for line in said.splitlines()[:-1]] == [[str(i), str(folders[i])] for i in range(3)]
    for i, folder in enumerate(folders):
        assert login.ends(f"{array}_{i}") == ("COMPLETED", "0:0"), login.said(f"{array}_{i}")
        assert json.loads((login.root / folder / "config.json").read_text())["settings"]["seed"] == i
        assert json.loads((login.root / folder / "result.json").read_text())["step"] == 20

    wrong = login.slurm.try_run("bash", "slurm/sweep.sh", "seed=0", "recipe=notbook", *settings, cwd=login.root)
    assert wrong.returncode == 2 and "did you mean 'notebook'?" in wrong.stderr and not wrong.stdout


def test_sweep_script_trains_networks_of_the_users_own(login: Login, digits):
    shutil.copy(networks.__file__, login.root / "mine.py")
    settings = (f"--data-dir={digits}", "--batch-size=50", "--steps=20", "--device=cpu", "--no-tensorboard")
    names = ("mlp", "mine.py:BatchNormDropout")
    sbatch = ("bash", "slurm/sweep.sh", "--parsable", *(f"model={name}" for name in names))
    login.jobs.append(array := login.slurm.run(*sbatch, *settings, cwd=login.root).splitlines()[-1])
    for i, name in enumerate(names):
        assert login.ends(f"{array}_{i}") == ("COMPLETED", "0:0"), login.said(f"{array}_{i}")
        config = json.loads((login.root / "runs" / "sweep" / f"model={name}" / "config.json").read_text())
        assert config["settings"]["model"] == name and (config["code_sha256"] is None) == (name == "mlp")


def test_sweep_task_asked_to_stop_is_requeued_alone(login: Login, digits):
    settings = (f"--data-dir={digits}", *SMALL, *ENDLESS)
    said = login.slurm.run("bash", "slurm/sweep.sh", "--parsable", "lr=0.1", "lr=0.2", *settings, cwd=login.root)
    login.jobs.append(array := said.splitlines()[-1])
    for task, folder in ((f"{array}_0", "lr=0.1"), (f"{array}_1", "lr=0.2")):
        login.wait_for(task, reaches(RunDirectory(login.root / "runs" / "sweep" / folder), 10))
    login.slurm.run("scancel", "--signal=USR1", f"{array}_1")
    login.starts_again(f"{array}_1")
    assert f"job {array}_1 is requeued, to resume from step-" in login.said(f"{array}_1")
    assert (login.state(f"{array}_0"), login.slurm.fact(f"{array}_0", "Restarts")) == ("RUNNING", "0")


def test_search_whose_worker_is_requeued_within_a_trial_resumes_it_with_the_same_bits(login: Login, digits, tmp_path):
    pytest.importorskip("optuna", reason="needs the extra 'search'")
    settings = (f"--data-dir={digits}", *SMALL, *EXACT, "--steps=400", "--nproc=1")
    search = ("bash", "slurm/sweep.sh", "--parsable", "lr=0.1", "lr=0.2", "--search=random", "--trials=2")
    wrong = login.slurm.try_run(*search, *settings, "--crop=3", cwd=login.root)
    assert wrong.returncode == 2 and "--crop 3 does not fit" in wrong.stderr and not wrong.stdout

    array = login.slurm.run(*search, *settings, cwd=login.root, env={"SWEEP_AT_ONCE": "2"})
    login.jobs.append(array)
    trials = [RunDirectory(login.root / "runs" / "sweep" / f"trial-00{number}") for number in range(2)]
    worker = f"{array}_1"
    login.wait_for(worker, lambda: all(reaches(trial, 10)() for trial in trials))
    login.slurm.run("scancel", "--batch", "--signal=USR1", worker)  # as Slurm does near the time limit
    login.starts_again(worker)
    said = login.said(worker)
    number, lr = re.search(r"trial-00(\d), \d of 2: lr=(0\.\d)", said).groups()
    assert f"job {worker} is requeued, to resume the search" in said and re.search(
        "[12] of 2 trials are unfinished", said
    ), said
    assert [login.ends(f"{array}_{task}") for task in range(2)] == [("COMPLETED", "0:0")] * 2, login.said(worker)
    assert all(trial.result_path.exists() and trial.checkpoints.path(400).exists() for trial in trials)
    assert not trials[0].path.with_name("trial-002").exists()
    assert digest(trials[int(number)]) == undisturbed(tmp_path / "undisturbed", digits, 400, f"--lr={lr}")


def test_job_without_its_data_ends_with_a_sentence(login: Login, settings, run):
    job = login.sbatch("--nodes=2", TRAIN, *settings, "--data-dir=/no/such/folder")
    assert login.ends(job) == ("FAILED", "2:0")
    assert login.said(job).startswith("error: /no/such/folder") and len(login.said(job).splitlines()) == 1
    assert login.slurm.fact(job, "Restarts") == "0" and not run.path.exists()


def test_doctor_under_srun_sees_all_ranks(login: Login, settings, run):
    doctor = (sys.executable, "-m", "dist_mnist", "doctor", *settings, "--json")
    report = json.loads(login.slurm.run("srun", "--nodes=2", "--ntasks-per-node=2", *doctor, cwd=login.root))
    assert [(rank["rank"], rank["host"]) for rank in report["ranks"]] == [(0, "n1"), (1, "n1"), (2, "n2"), (3, "n2")]
    assert all(finding["problem"] is None for finding in report["findings"])
    assert not [*run.path.parent.glob(".meeting-*")], "the file in which the ranks met is gone"
