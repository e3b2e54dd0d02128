"""Coverage-guided fuzzing of file readers: each file must be a valid array or checkpoint, or refused with an error.

    python tests/sweeps/fuzz.py idx --runs 10000000
    python tests/sweeps/fuzz.py checkpoint --runs 100000

It needs atheris, Google's fuzzer for Python (`pip install atheris`; Linux, and a Python that it has a wheel for). It
starts from tests/sweeps/corpus/, which has a line of hexadecimal digits for each case that reached new code or failed.
`--renew` adds the new cases. The tests run each case of the corpus (tests/test_corpus.py).

Other options go to libFuzzer, such as -max_total_time=600. Fuzzing ends at the first case that fails, and prints its
bytes.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
CORPUS = Path(__file__).parent / "corpus"
LONGEST = 1000  # characters of an error message


def sentence(error: Exception, path: Path) -> None:
    """Assert that an error names the file and is short."""
    assert str(path) in str(error) and len(str(error)) < LONGEST, f"no sentence for a user: {error}"


def idx(data: bytes, folder: Path) -> None:
    """Read an idx file. The first byte selects what the others are: idx file, gzip file, or content of a gzip file."""
    from dist_mnist.data.idx import Header, IdxError, open_idx, unpack

    kind, content = data[:1], data[1:]
    path = folder / "x"
    if kind in (b"g", b"p"):
        packed = folder / "x.gz"
        packed.write_bytes(content if kind == b"g" else gzip.compress(content, 1, mtime=0))
        path.unlink(missing_ok=True)
        try:
            unpack(packed, path)
        except IdxError as error:
            sentence(error, packed)
            assert [*folder.iterdir()] == [packed], "something was left"
            return
        content = gzip.decompress(packed.read_bytes())
        assert path.read_bytes() == content
    else:
        path.write_bytes(content)
    try:
        array = open_idx(path)
    except IdxError as error:
        sentence(error, path)
        assert kind not in (b"g", b"p"), "what unpacked well is no idx file"
    else:
        assert Header(array.dtype, array.shape).to_bytes() + array.tobytes() == content


def checkpoint(data: bytes, folder: Path) -> None:
    """Read a checkpoint. The first byte selects what the others are: file, header, metadata, or changes to metadata."""
    import torch

    from dist_mnist.distributed.world import World
    from dist_mnist.evaluation.checkpoints.load import load_models
    from dist_mnist.run.checkpoints.file import load_checkpoint, read_info
    from dist_mnist.run.directory import RunDirectory
    from dist_mnist.utils.errors import UserError
    from helpers.checkpoints import forged

    kind, content = data[:1], data[1:]
    path = folder / "step-00000005.safetensors"
    if kind == b"h":
        path.write_bytes(len(content).to_bytes(8, "little") + content + b"\0" * 8)
    elif kind == b"t":
        path.write_bytes(forged(text=content.decode(errors="replace")))
    elif kind == b"c":
        path.write_bytes(forged(_changed(content)))
    else:
        path.write_bytes(content)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    for read in (read_info, load_checkpoint, lambda path: load_models([path], world)):
        try:
            read(path)
        except UserError as error:
            sentence(error, path)
    run = RunDirectory(folder)
    run.checkpoints.folder.mkdir(exist_ok=True)
    path = path.rename(run.checkpoints.folder / path.name)
    for use in (
        run.checkpoints.newest_info,
        run.checkpoints.summary,
        lambda: run.checkpoints.best(str),
        lambda: run.checkpoints.prune(1),
        lambda: run.checkpoints.newest(str),
    ):
        try:
            use()
        except UserError as error:
            sentence(error, folder)
    for path in run.checkpoints.folder.iterdir():
        path.unlink()


STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 5, 100, 101, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "a", "none", "\0", "../..", "x" * 5000, [], [0], [1, 8, 8], [2**62], [[[]]], {}, {"a": 1}, [None],
    10**400, -(10**400), "\ud800", 10**308, 1.0, [1.0, None, 3.0],
)  # fmt: skip


def _changed(content: bytes) -> dict[str, Any]:
    """Return a checkpoint's metadata with changes; each pair of bytes selects a value and how to change it."""
    from helpers.checkpoints import DESCRIPTION

    info = json.loads(json.dumps(DESCRIPTION | {"validation": {"accuracy": 0.5, "loss": 1.0}}))
    for where, what in zip(content[::2], content[1::2], strict=False):
        holder: Any = info
        names = list(holder)
        name = names[where % len(names)]
        if isinstance(holder[name], dict) and holder[name] and where >= len(names):
            holder = holder[name]
            names = list(holder)
            name = names[(where // 8) % len(names)]
        if what < len(STRANGE):
            holder[name] = STRANGE[what]
        elif what == 255:
            del holder[name]
        else:
            holder[f"{name}{what}"] = holder[name]
        if not info:
            break
    return info


TARGETS: dict[str, Callable[[bytes, Path], None]] = {"idx": idx, "checkpoint": checkpoint}


def cases(target: str) -> list[bytes]:
    """Return the corpus of a target."""
    return [bytes.fromhex(line) for line in (CORPUS / f"{target}.txt").read_text().splitlines()]


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder, in memory if possible."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def fuzz(target: str, options: list[str]) -> None:
    """Run libFuzzer's loop; does not return."""
    import atheris

    with atheris.instrument_imports(include=["dist_mnist", "gzip"]):
        pass

    check = TARGETS[target]

    def once(data: bytes) -> None:
        try:
            check(data, Path(folder))
        except BaseException:
            print(f"These bytes break a promise: {data.hex()}", file=sys.stderr)
            raise

    with scratch() as folder:
        atheris.Setup([sys.argv[0], *options], once)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=1_000_000, help="executions")
    parser.add_argument("--renew", action="store_true", help="add what is found to the corpus")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments, options = parser.parse_known_args()
    if arguments.inside:
        fuzz(arguments.target, options)
    with tempfile.TemporaryDirectory() as found:
        for number, case in enumerate(cases(arguments.target)):
            (Path(found) / str(number)).write_bytes(case)
        command = [sys.executable, __file__, arguments.target, "--inside", f"-runs={arguments.runs}"]
        limits = [
            "-timeout=10",
            "-rss_limit_mb=2000",
            "-max_len=4096",
            "-reduce_inputs=1",
            f"-artifact_prefix={found}/",
        ]
        done = subprocess.run([*command, *limits, *options, found], check=False)
        for kind in ("crash", "timeout", "oom"):
            for path in Path(found).glob(f"{kind}-*"):
                print(f"{kind}: {path.read_bytes().hex()}", file=sys.stderr)
        if done.returncode == 0 and arguments.renew:
            lines = sorted(
                {path.read_bytes().hex() for path in Path(found).iterdir()}, key=lambda line: (len(line), line)
            )
            (CORPUS / f"{arguments.target}.txt").write_text("".join(f"{line}\n" for line in lines))
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
