"""What a person sees on a terminal, wide or narrow, with or without colours; and what goes into a log."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from helpers import HANGS_AFTER_S
from helpers.data import some_digits, write_npz
from helpers.runs import SMALL, dist_mnist, train_here

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def on_terminal(columns: int, *words: object, **environment: str) -> str:
    """All that a command sends to a terminal of so many columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    others = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "CI")}
    command = [sys.executable, "-m", "dist_mnist", *map(str, words)]
    with subprocess.Popen(
        command, stdin=its, stdout=its, stderr=its, env=others | {"TERM": "xterm-256color"} | environment
    ) as process:
        os.close(its)
        try:
            found = b"".join(iter(lambda: _read(ours), b""))
            assert process.wait(timeout=HANGS_AFTER_S) == 0, found.decode()
        finally:
            process.kill()
            os.close(ours)
    return found.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the last that had it open has closed it
        return b""


def train(digits: Path, run_dir: Path) -> list[object]:
    data = (f"--data-dir={digits}", f"--run-dir={run_dir}")
    return ["train", "--nproc=1", "--max-restarts=0", *data, *SMALL, "--steps=24", "--log-every=4"]


@pytest.mark.parametrize("columns", [50, 160])
def test_progress_on_a_terminal_of_any_width_stays_in_one_line(digits, tmp_path, columns):
    run_dir = tmp_path / "a run"
    seen = on_terminal(columns, *train(digits, run_dir), NO_COLOR="1")
    assert not COLOUR.search(seen), "NO_COLOR"
    shown = [line for line in re.split(r"[\r\n]+", CONTROL.sub("", seen)) if "/24" in line and "validation" not in line]
    assert any("24/24" in line for line in shown) and max(map(len, shown)) <= columns
    assert all("epoch" in line and "loss" in line for line in shown if line.split("/24")[1].strip())
    assert any("lr " in line for line in shown) == (columns == 160)
    assert f"dist-mnist predict IMAGE... --ckpt '{run_dir}'" in " ".join(seen.split())


def test_progress_between_log_lines_moves(digits, tmp_path):
    seen = on_terminal(100, *train(digits, tmp_path / "run"), "--steps=600", "--log-every=600", "--validate-every=600")
    counts = {int(count) for count in re.findall(r"(\d+)/600", CONTROL.sub("", seen))}
    assert {0, 600} < counts, "it also moves in between"


def test_log_in_a_file_has_a_line_for_each_interval_and_no_control_characters(digits, tmp_path):
    done = train_here(digits, tmp_path / "run", *SMALL, "--steps=24", "--log-every=4")
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout, done.stderr
    steps = re.findall(r"^step +(\d+)/24  epoch", done.stdout, re.MULTILINE)
    assert steps == ["4", "8", "12", "16", "20", "24"]
    assert "tensorboard" not in done.stdout.split("result ")[1], "there are no curves to look at"


@pytest.mark.parametrize("errors_too", [False, True])
def test_log_on_a_full_disk_does_not_end_a_run(digits, tmp_path, errors_too):
    options = ["--steps=40", "--log-every=4", "--validate-every=4", "--patience=1", "--lr=0"]
    command = [sys.executable, "-m", "dist_mnist", *map(str, train(digits, tmp_path / "run")), *options]
    with open("/dev/full", "w") as full:
        errors = full if errors_too else subprocess.PIPE
        done = subprocess.run(command, stdout=full, stderr=errors, text=True, timeout=HANGS_AFTER_S)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/result.json").exists()
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").open()] == [4, 4, 8, 8]
    if not errors_too:
        why = "standard output cannot be written (No space left on device)"
        assert done.stderr == f"warning: {why}; training goes on without it\n"


def test_tables_fit_a_narrow_terminal_and_have_no_colours_in_a_pipe(digits):
    narrow = on_terminal(60, "data", "info", digits)
    assert max(map(len, CONTROL.sub("", narrow).splitlines())) <= 60
    assert "\x1b" not in dist_mnist("data", "info", digits).stdout


def test_import_shows_progress_on_a_terminal_and_none_in_a_log(tmp_path):
    source = write_npz(tmp_path / "a.npz", some_digits())
    seen = on_terminal(100, "data", "import", source, "--to", tmp_path / "seen", NO_COLOR="1")
    assert "160/160" in CONTROL.sub("", seen) and "pictures" in seen
    done = dist_mnist("data", "import", source, "--to", tmp_path / "logged")
    assert done.returncode == 0 and done.stderr == "" and "160/160" not in done.stdout


def test_info_shows_progress_on_a_terminal_and_none_in_a_log(digits):
    seen = CONTROL.sub("", on_terminal(100, "data", "info", digits, NO_COLOR="1"))
    assert "800/800" in seen and "duplicates (training)" in seen
    done = dist_mnist("data", "info", digits, "--json")
    assert done.returncode == 0 and done.stderr == ""
