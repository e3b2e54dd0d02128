"""`dist-mnist doctor` on this machine, alone and with two ranks; over several nodes see the tests in cluster/."""

import json
import signal
import sys
from pathlib import Path

import pytest

from helpers import HANGS_AFTER_S
from helpers.runs import are_gone, wait_for

CHECKS = ["ready to train", "versions", "settings", "data", "network", "devices", "run directory", "clocks"]


@pytest.fixture
def doctor(run, tmp_path):
    """`doctor(data, *options)`: what the command does, and its report."""

    def doctor(data: Path, *options: str):
        settings = (f"--data-dir={data}", f"--run-dir={tmp_path / 'run'}", "--device=cpu", "--json", *options)
        done = run(1, "-m", "dist_mnist", "doctor", *settings)
        return done, json.loads(done.stdout)

    return doctor


@pytest.mark.parametrize("nproc", [1, 2])
def test_doctor_where_all_fits_finds_no_problem(doctor, digits, tmp_path, nproc):
    done, report = doctor(digits, f"--nproc={nproc}")
    assert (done.returncode, done.stderr) == (0, "")
    assert [rank["rank"] for rank in report["ranks"]] == list(range(nproc))
    assert [finding["what"] for finding in report["findings"]] == CHECKS
    assert not [finding for finding in report["findings"] if finding["problem"]]
    assert {rank["settings"]["recipe"] for rank in report["ranks"]} == {"default"}
    assert [row["size"] for row in report["all_reduce"]] == (["8 B", "1 MB", "16 MB", "64 MB"] if nproc > 1 else [])
    assert all(row["seconds"] > 0 for row in report["all_reduce"])
    assert not list(tmp_path.glob(".doctor-*")) and not (tmp_path / "run").exists()


def test_doctor_with_data_missing_reports_it_for_all_ranks_and_exits_2(doctor, tmp_path):
    done, report = doctor(tmp_path / "nothing", "--nproc=2")
    assert (done.returncode, done.stderr) == (2, "")
    [problem] = [finding for finding in report["findings"] if finding["problem"]]
    assert problem["what"] == "ready to train" and problem["found"] == "0 of 2 ranks"
    assert problem["problem"].startswith("rank 0 on ") and ", 1 on " in problem["problem"]
    assert str(tmp_path / "nothing") in problem["problem"]
    assert [rank["data"] for rank in report["ranks"]] == [None, None]


def test_doctor_under_plain_torchrun_reports_once(run, digits, tmp_path):
    settings = (f"--data-dir={digits}", f"--run-dir={tmp_path / 'run'}", "--device=cpu", "--json")
    done = run(2, "-m", "dist_mnist", "doctor", *settings)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["ranks"]) == 2


def test_doctor_asked_to_end_does_so_with_its_ranks(launch, ranks_of, digits, tmp_path):
    process = launch(1, "-m", "dist_mnist", "doctor", "--nproc=2", f"--data-dir={digits}", f"--run-dir={tmp_path}/run")
    wait_for(lambda: len(ranks_of(process.pid)) == 2, process)
    ranks = ranks_of(process.pid)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANGS_AFTER_S)
    assert (process.returncode, err) == (128 + signal.SIGINT, "")
    assert are_gone(ranks)()


def test_doctor_for_people_ends_with_a_verdict(run, digits, tmp_path):
    done = run(1, "-m", "dist_mnist", "doctor", "--nproc=1", f"--data-dir={digits}", f"--run-dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "These ranks can train together."
    assert sys.version.split()[0] in done.stdout
