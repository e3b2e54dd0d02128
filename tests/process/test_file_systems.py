"""File systems and environments as people have them: no fsync, locks or memory maps; names that are not UTF-8; no home.

strace makes system calls on the files concerned fail, as such file systems do (NFS without its lock daemon, FUSE).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_mnist.data.idx import write_idx
from dist_mnist.run.directory import RunDirectory
from dist_mnist.utils.files import path_of, path_text
from helpers import HANGS_AFTER_S
from helpers.runs import SMALL, descendants, digest, dist_mnist, reaches, start, trained_here, wait_for

STEPS = ("--steps=6", "--checkpoint-every=2", "--log-every=2")
NO_LOCKS = "this file system has no locks (No locks available)"
NO_MAPS = "this file system has no memory maps (No such device)"
OPEN = """
import sys
import numpy as np
from pathlib import Path
from dist_mnist.data.idx import Source, open_idx
array = open_idx(Path(sys.argv[1]))
Source(array).check()
print(type(array).__name__, array.flags.writeable, array.sum())
"""


def failing(calls: str, error: str, *paths: Path) -> tuple[str, ...]:
    """Begins a command in which these system calls fail with an error, on these files alone if some are named."""
    files = [word for path in paths for word in ("-P", str(path))]
    options = ("-f", "--seccomp-bpf", "-qq", "-o", "/dev/null")  # other calls take no longer than without strace
    return ("strace", *options, "-e", f"trace={calls}", "-e", f"inject={calls}:error={error}", *files)


def why_no_faults() -> str | None:
    """What keeps system calls from being made to fail here; None if nothing does."""
    if not shutil.which("strace"):
        return "needs strace (Debian, Ubuntu: apt-get install strace)"
    command = [*failing("fsync", "EIO"), "true"]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S)
    return f"strace may not follow processes here: {tried.stderr.strip()}" if tried.returncode else None


def why_no_user() -> str | None:
    """What keeps this machine from having a process whose user id has no name; None if nothing does."""
    if not shutil.which("unshare"):
        return "needs unshare (Debian, Ubuntu: apt-get install util-linux)"
    tried = subprocess.run([*NAMELESS, "true"], capture_output=True, text=True, timeout=HANGS_AFTER_S)
    return f"needs a kernel with user namespaces: {tried.stderr.strip()}" if tried.returncode else None


NAMELESS = ("unshare", "--user", "--map-user=12345")
needs_faults = pytest.mark.skipif(bool(reason := why_no_faults()), reason=str(reason))
needs_user = pytest.mark.skipif(bool(reason := why_no_user()), reason=str(reason))


def train_command(data: Path, run: Path, *options: str, nproc: int = 2) -> tuple[str, ...]:
    words = ("train", f"--nproc={nproc}", f"--data-dir={data}", f"--run-dir={run}", *SMALL, *options)
    return (sys.executable, "-m", "dist_mnist", *words)


def ended(*command: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S, **options)


def warnings_in(stderr: str) -> list[str]:
    """The warnings, except of stragglers: how fast a rank is depends on what else runs on this machine."""
    return [line for line in stderr.splitlines() if line.startswith("warning: ") and "is a straggler" not in line]


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory) -> str:
    """The digest of two processes' run in which nothing fails."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = ended(*train_command(digits, run, *STEPS))
    assert done.returncode == 0 and not warnings_in(done.stderr), done.stderr
    return digest(RunDirectory(run))


@needs_faults
def test_train_without_fsync_warns_once_and_ends_with_the_same_bits(digits, tmp_path, undisturbed):
    run = tmp_path / "run"
    done = ended(*failing("fsync", "EINVAL"), *train_command(digits, run, *STEPS))
    assert done.returncode == 0, done.stderr
    [warning] = warnings_in(done.stderr)
    assert warning.startswith(f"warning: {run}: this file system has no fsync (Invalid argument)")
    assert "a run resumes from its newest intact checkpoint" in warning
    assert digest(RunDirectory(run)) == undisturbed


@needs_faults
def test_train_disk_that_fails_is_an_error(digits, tmp_path):
    done = ended(*failing("fsync", "EIO"), *train_command(digits, tmp_path / "run", *STEPS))
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: {tmp_path / 'run'}: the run directory cannot be written (Input/output error)"
    )


@needs_faults
def test_train_without_locks_warns_once_refuses_a_second_run_and_resumes_after_a_kill(digits, tmp_path, undisturbed):
    run = RunDirectory(tmp_path / "run")
    command = (*failing("flock", "ENOLCK"), *train_command(digits, run.path, *STEPS, "--checkpoint-every=1"))
    longer = ("--steps=40000", "--schedule=constant", "--warmup-fraction=0")
    slow = start(*command, *longer)
    try:
        wait_for(reaches(run, 3), slow)
        second = ended(*command, *longer)
        assert second.returncode == 2
        owner = json.loads(run.ownership.owner_path.read_text())
        assert f"another run is using this folder (process {owner['process']} on " in second.stderr
        assert slow.poll() is None
        for pid in [*descendants(slow.pid), slow.pid]:
            os.kill(pid, signal.SIGKILL)
    finally:
        if slow.poll() is None:
            os.killpg(slow.pid, signal.SIGKILL)
        _, err = slow.communicate(timeout=HANGS_AFTER_S)
    [warning] = warnings_in(err)
    assert warning.startswith(f"warning: {run.path}: {NO_LOCKS}, so two runs that start here")
    assert run.ownership.owner_path.exists() and not run.result_path.exists()
    shutil.rmtree(run.checkpoints.folder)
    done = ended(*command)
    assert done.returncode == 0 and len(warnings_in(done.stderr)) == 1, done.stderr
    assert digest(run) == undisturbed
    assert not run.ownership.owner_path.exists()


@needs_faults
def test_data_that_must_be_made_without_locks_is_made_with_a_warning(digits, tmp_path):
    """Unpacked in the cache, and copied for --stage-data: each file by a lock of its own."""
    for path in digits.iterdir():
        shutil.copy(path, tmp_path)
    packed = subprocess.run(["gzip", *tmp_path.iterdir()], timeout=HANGS_AFTER_S, check=False)
    assert packed.returncode == 0
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    command = train_command(tmp_path, tmp_path / "run", *STEPS, "--stage-data", nproc=1)
    done = ended(*failing("flock", "ENOSYS"), *command, "--max-restarts=0", env=environment)
    assert done.returncode == 0, done.stderr
    warnings = warnings_in(done.stderr)
    assert len(warnings) == 2 and "processes that need the same file at the same time each create it" in warnings[0]
    assert not list((tmp_path / "tmp").glob("*/.*"))


@needs_faults
def test_train_without_memory_maps_warns_once_and_ends_with_the_same_bits(digits, tmp_path, undisturbed):
    run = RunDirectory(tmp_path / "run")
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    done = ended(*failing("mmap", "ENODEV", *data.iterdir(), run.progress_path), *train_command(data, run.path, *STEPS))
    assert done.returncode == 0, done.stderr
    [warning] = warnings_in(done.stderr)
    assert warning.startswith(f"warning: {data}: {NO_MAPS}, so each process reads whole files into memory (")
    assert digest(run) == undisturbed


@needs_faults
@pytest.mark.parametrize(("error", "expected", "warns"), [
    ("ENODEV", "ndarray False 2550", True),
    ("EACCES", "ndarray False 2550", True),
    ("ENODEV:when=1", "memmap False 2550", False),  # as FUSE with direct I/O: private maps alone
])  # fmt: skip
def test_open_idx_without_maps_gives_the_same_numbers(tmp_path, error, expected, warns):
    path = tmp_path / "x"
    write_idx(path, np.full((2, 5), 255, np.uint8))
    done = ended(*failing("mmap", error, path), sys.executable, "-c", OPEN, str(path))
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr
    assert (done.stderr.count("no memory maps"), done.stderr.count("\n")) == (warns, warns)


@needs_faults
def test_train_initial_weights_without_maps_are_read(digits, finished_runs, tmp_path):
    init = RunDirectory(finished_runs[0]).checkpoints.paths()[-1]
    command = train_command(digits, tmp_path / "run", *STEPS, f"--init={init}", nproc=1)
    done = ended(*failing("mmap", "ENODEV", init), *command, "--max-restarts=0")
    assert done.returncode == 0 and "(100.0% of the numbers)" in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def odd(digits, tmp_path_factory) -> tuple[Path, Path]:
    """A folder of data and one of a finished run of two processes, whose names are not UTF-8."""
    folder = tmp_path_factory.mktemp("odd")
    data = folder / os.fsdecode(b"donn\xe9es 'x'")
    shutil.copytree(digits, data)
    run = folder / os.fsdecode(b"caf\xe9 'x'")
    done = ended(*train_command(data, run, *STEPS, "--tensorboard"))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "caf\\xe9 'x': there are no curves for TensorBoard, which cannot read a folder whose name is" in done.stderr
    assert f"dist-mnist report $'{folder}/caf\\351\\040\\047x\\047'" in done.stdout
    return data, run


def test_runs_of_names_that_are_not_utf8_resume_and_are_read(odd):
    data, path = odd
    run = RunDirectory(path)
    before = digest(run)
    run.result_path.unlink()
    for checkpoint in run.checkpoints.paths()[1:]:
        checkpoint.unlink()
    done = ended(*train_command(data, path, *STEPS, "--max-restarts=0", nproc=2))
    assert done.returncode == 0 and "resume    after step 2" in done.stdout, done.stderr
    assert digest(run) == before
    for file in (run.config_path, run.result_path, run.metrics_path):
        file.read_bytes().decode()
    facts = json.loads(run.config_path.read_bytes())
    assert path_of(facts["data"]["folder"]) == data and path_of(facts["settings"]["run_dir"]) == path
    assert facts["data"]["folder"].endswith("/donn%E9es%20%27x%27")
    dry = (sys.executable, "-m", "dist_mnist", "train", "--dry-run", f"--run-dir={path_text(path)}")
    done = ended(*dry, errors="surrogateescape")
    assert (done.returncode, done.stdout) == (0, f"{path}\n"), "the data is found by what the run says"


@pytest.mark.parametrize("words", [
    ("eval", "--json", "--ckpt"), ("eval", "--ckpt"), ("compare",), ("compare", "--json"), ("report",),
    ("ckpt", "list"), ("ckpt", "verify"), ("ckpt", "show"), ("replay", "--to=2"),
], ids=" ".join)  # fmt: skip
def test_command_for_a_run_of_a_name_that_is_not_utf8_works(odd, words):
    done = dist_mnist(*words, odd[1])
    assert done.returncode == 0, done.stderr
    if "--json" in words or "show" in words:
        done.stdout.encode()
        json.loads(done.stdout)


def test_output_of_names_that_are_not_utf8_is_what_other_programs_take(odd):
    data, run = odd
    command = (sys.executable, "-m", "dist_mnist", "report", os.fsencode(run))
    done = subprocess.run(command, capture_output=True, timeout=HANGS_AFTER_S, env={**os.environ, "LANG": "C.UTF-8"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == os.fsencode(run / "report.html") + b"\n"
    assert b"caf\\xe9 &#39;x&#39;" in (run / "report.html").read_bytes()
    info = dist_mnist("data", "info", data)
    assert info.returncode == 0, info.stderr


def test_train_data_of_a_name_that_is_not_utf8_makes_a_usual_run_directory(odd, tmp_path):
    done = ended(*train_command(odd[0], tmp_path, *STEPS, nproc=1)[:4], f"--data-dir={odd[0]}", *SMALL, "--dry-run",
                 cwd=tmp_path, errors="surrogateescape")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(os.fsdecode(b"runs/default-donn\xe9es 'x'-"))


@pytest.fixture
def nameless(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`nameless(*words)` is `dist-mnist` by a user who has neither a name nor a home, nor any variable but PATH."""
    (tmp_path / "tmp").mkdir()
    python_path = [f"PYTHONPATH={os.environ['PYTHONPATH']}"] if "PYTHONPATH" in os.environ else []
    environment = ("env", "-i", f"PATH={os.environ['PATH']}", f"TMPDIR={tmp_path / 'tmp'}", *python_path)

    def nameless(*words: object) -> subprocess.CompletedProcess[str]:
        command = (*NAMELESS, *environment, sys.executable, "-m", "dist_mnist", *map(str, words))
        return ended(*command, cwd=tmp_path)

    return nameless


@needs_user
def test_train_and_report_by_a_user_without_name_or_home_work(nameless, digits, tmp_path):
    packed = tmp_path / "packed"
    shutil.copytree(digits, packed)
    assert subprocess.run(["gzip", *packed.iterdir()], timeout=HANGS_AFTER_S, check=False).returncode == 0
    packed.chmod(0o555)  # so that the files are unpacked in the cache
    try:
        train = nameless(*train_command(packed, tmp_path / "run", *STEPS, "--tensorboard")[3:])
        assert train.returncode == 0 and not warnings_in(train.stderr), train.stderr
        report = nameless("report", tmp_path / "run")
    finally:
        packed.chmod(0o755)
    assert report.returncode == 0, report.stderr
    assert (tmp_path / "run" / "report.html").exists() and list((tmp_path / "run" / "tensorboard").iterdir())
    assert len(list((tmp_path / "tmp" / "dist-mnist-12345" / "cache").iterdir())) == 4


@needs_user
def test_settings_file_with_a_home_for_a_user_without_one_is_a_sentence(nameless, tmp_path):
    (tmp_path / "settings.toml").write_text('data_dir = "~/data"\n')
    done = nameless("train", "--config=settings.toml")
    assert done.returncode == 2
    assert done.stderr == (
        "error: --config settings.toml: data_dir = '~/data': HOME is not set and this user id has no name on this "
        "machine; write the path in full\n"
    )


def test_train_settings_file_names_folders_by_home(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(digits, tmp_path / "data")
    init = trained_here(digits, tmp_path / "first", *STEPS)
    settings = 'data_dir = "~/data"\nrun_dir = "~/run"\ninit = "~/first"\n'
    (tmp_path / "settings.toml").write_text(settings)
    done = dist_mnist("train", f"--config={tmp_path / 'settings.toml'}", *SMALL, *STEPS, "--nproc=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").exists() and not (tmp_path / "~").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init"]["path"].startswith(str(init))
