"""Who owns a run directory where the file system has no locks: only its token tells."""

import errno
import fcntl
import os
import socket
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from dist_mnist.run.directory import RunDirectory
from dist_mnist.run.ownership import RUN_ID, TakenOver
from dist_mnist.run.records import Owner
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.files import atomic_write, to_json
from dist_mnist.utils.schema import parse

WAIT_S = 0.2
GONE = 2**22 - 1  # above what Linux gives to processes unless it is told to


@pytest.fixture(autouse=True)
def no_locks(monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr("dist_mnist.utils.errors._warned", set())


@pytest.fixture
def run(tmp_path, capsys) -> RunDirectory:
    """A run directory whose last owner has left its token, as one that was killed does."""
    run = RunDirectory(tmp_path / "run")
    with run.owned():
        left = run.ownership.owner_path.read_bytes()
    assert capsys.readouterr().err.count("this file system has no locks (No locks available)") == 1
    write(run, parse(left, Owner))
    return run


def write(run: RunDirectory, owner: Owner) -> None:
    with atomic_write(run.ownership.owner_path) as file:
        file.write(to_json(owner).encode())


def owner_of(run: RunDirectory) -> Owner:
    return parse(run.ownership.owner_path.read_bytes(), Owner)


def test_owned_by_a_process_at_work_is_refused(run, capsys):
    with pytest.raises(UserError) as raised, run.owned(WAIT_S):
        pass
    assert str(raised.value) == (
        f"{run.path}: another run is using this folder (process {os.getpid()} on {socket.gethostname()}); give "
        "another --run-dir"
    )
    assert owner_of(run).process == os.getpid()
    assert "no locks" not in capsys.readouterr().err, "it was said before"


@pytest.mark.parametrize("change", [{"process": GONE}, {"started_at": 1.5}], ids=["no process", "another process"])
def test_owned_by_a_process_that_has_ended_is_taken_at_once(run, capsys, change):
    if change.get("process") and psutil.pid_exists(GONE):
        pytest.skip(f"there is a process {GONE}")
    write(run, replace(owner_of(run), **change))
    with run.owned(wait_s=1e9):
        assert owner_of(run).process == os.getpid()
    assert "taken over" not in capsys.readouterr().err and not run.ownership.owner_path.exists()


def test_owned_on_another_node_is_taken_over_and_the_owner_ends(run, capsys):
    write(run, replace(owner_of(run), host="elsewhere", process=7))
    cut_off = RunDirectory(run.path)
    cut_off.ownership._token = owner_of(run).token  # as the process there has it
    cut_off.ownership.check()
    with run.owned(WAIT_S):
        assert "is taken over from its last owner (process 7 on elsewhere), which may" in capsys.readouterr().err
        with pytest.raises(TakenOver, match=rf"process {os.getpid()} on .* has taken over this run"):
            cut_off.write_json(cut_off.result_path, {})


def test_owned_in_the_same_rendezvous_is_taken_over(run, capsys, monkeypatch):
    monkeypatch.setenv(RUN_ID, "one")
    write(run, replace(owner_of(run), run_id="one"))
    with run.owned(WAIT_S):
        assert "which no longer takes part in the run" in capsys.readouterr().err


def test_owned_lock_that_fails_is_an_error(tmp_path: Path, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="the run directory cannot be written"), RunDirectory(tmp_path).owned(WAIT_S):
        pass
