"""What files need of a file system, done without where it has it not; and paths as text."""

import errno
import fcntl
import json
import os
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from dist_mnist.utils import errors
from dist_mnist.utils.errors import UserError, printable, spare_children_warnings, warn_once
from dist_mnist.utils.files import atomic_folder, atomic_write, locked, path_of, path_text, shell_word, to_json
from helpers import HANGS_AFTER_S

UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
ODD = os.fsdecode(b"/data/caf\xe9 x")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(errors, "_warned", set())
    monkeypatch.setenv(errors.WARNED, "")


def failing(number: int):
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", UNSUPPORTED)
def test_atomic_write_and_folder_without_fsync_warn_once_and_write(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(os, "fsync", failing(number))
    for name in ("a", "b"):
        with atomic_write(tmp_path / name) as file:
            file.write(b"whole")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "c").write_bytes(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "folder"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "folder" / "c").read_bytes() == b"whole"
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {tmp_path}: this file system has no fsync ({os.strerror(number)}), so writes")
    assert said.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_atomic_write_disk_that_fails_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(OSError, match=os.strerror(number)), atomic_write(tmp_path / "a") as file:
        file.write(b"lost")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [*UNSUPPORTED, errno.ENOLCK])
def test_locked_without_locks_says_so_once_and_goes_on(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    for _ in range(2):
        with locked(tmp_path / ".lock", "two may do the same") as is_alone:
            assert not is_alone
    said = f"this file system has no locks ({os.strerror(number)}), so two may do the same"
    assert capsys.readouterr().err == f"warning: {tmp_path}: {said}\n"


def test_locked_excludes_others_and_ends(tmp_path, capsys):
    path = tmp_path / ".lock"
    with locked(path, "") as is_alone:
        assert is_alone
        with pytest.raises(Timeout), FileLock(path, timeout=0):
            pass
        with pytest.raises(Timeout), locked(path, "", wait_s=0):
            pass
    with locked(path, "", wait_s=0):
        pass
    assert capsys.readouterr().err == ""


def test_locked_by_a_disk_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / ".lock", ""):
        pass


def test_warn_once_is_not_said_again_by_other_ranks_and_children(monkeypatch, capsys):
    warn_once("a 1", "one")
    warn_once("a 1", "one")
    assert capsys.readouterr().err == "warning: one\n"
    spare_children_warnings()
    monkeypatch.setattr(errors, "_warned", set())  # as in a child
    warn_once("a 1", "one")
    warn_once("a 2", "two")
    monkeypatch.setenv("LOCAL_RANK", "1")
    warn_once("a 3", "three")
    assert capsys.readouterr().err == "warning: two\n"


@pytest.mark.parametrize(("path", "text"), [
    ("runs/a", "runs/a"), ("ü 😀", "ü 😀"), (ODD, "file:/data/caf%E9%20x"), ("file:x", "file:file%3Ax"),
])  # fmt: skip
def test_path_text_is_utf8_and_leads_back(path, text):
    assert path_text(Path(path)) == text and path_of(text) == Path(path)
    text.encode()


def test_path_of_a_uri_is_the_path():
    assert path_of("file:///data/caf%E9%20x") == Path(ODD)


def test_text_for_people_and_json_have_escapes_for_bytes():
    assert printable(ODD) == r"/data/caf\xe9 x"


@pytest.mark.parametrize(("text", "shown"), [
    ("to http://ann:s3cr3t@host:5000/api failed", "to http://...@host:5000/api failed"),
    ("https://token@host, http://a:b@c@d/e and s3://f/g@h", "https://...@host, http://...@d/e and s3://f/g@h"),
    ("ann@example.org, http://host/@me?to=a@b", "ann@example.org, http://host/@me?to=a@b"),
])  # fmt: skip
def test_printable_has_no_passwords_of_urls(text, shown):
    assert printable(text) == shown and str(UserError(text)) == shown
    assert json.loads(to_json({"a": [ODD], "b": "😀", "c": 1})) == {"a": [r"/data/caf\xe9 x"], "b": "😀", "c": 1}


@pytest.mark.parametrize("name", ["a b", "it's", os.fsdecode(b"it's \xe9\xff7\\$")])
def test_shell_word_is_read_by_bash_as_the_path(name):
    done = subprocess.run(
        ["bash", "-c", f"printf %s {shell_word(Path(name))}"], capture_output=True, timeout=HANGS_AFTER_S, check=True
    )
    assert done.stdout == os.fsencode(name)
