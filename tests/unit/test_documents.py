"""The documents compared with the program: links, commands, options, files and Python code in them exist and work."""

import doctest
import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest
import typer

import dist_mnist
from dist_mnist.cli.app import app
from dist_mnist.config.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".github", "dist_mnist", "launch", "slurm", "tests")
DOCUMENTS = [ROOT / "README.md", *sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))]
STARTS_TRAINING = ("launch/local.sh", "launch/multinode.sh", "slurm/train.sh", "slurm/sweep.sh", "-m dist_mnist.train")
OF_OTHERS = {"--logdir", "--break-system-packages"}  # of TensorBoard and pip, when named in prose


def name_of(document: Path) -> str:
    """A document's path in the repository."""
    return str(document.relative_to(ROOT))


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


def blocks(document: Path, language: str) -> list[str]:
    """The code blocks of a document that are marked as `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)


@cache
def commands() -> dict[tuple[str, ...], set[str]]:
    """Every command of `dist-mnist`, as its words, with its options."""
    found: dict[tuple[str, ...], set[str]] = {}

    def walk(command: click.Command, words: tuple[str, ...]) -> None:
        options = [name for param in command.params for name in (*param.opts, *param.secondary_opts)]
        found[words] = {name for name in options if name.startswith("-")} | {"--help"}
        for name, child in getattr(command, "commands", {}).items():
            walk(child, (*words, name))

    walk(typer.main.get_command(app), ())
    return found


def options_in(words: list[str]) -> set[str]:
    """The long options among the words of a command."""
    return {word.split("=")[0] for word in words if word.startswith("--") and word != "--"}


@each_document
def test_links_and_pictures_resolve(document):
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" in link or (document.parent / link).exists(), link


@each_document
def test_commands_exist_with_their_options(document):
    for line in "".join(blocks(document, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        for word in words:  # scripts and their folders
            if re.fullmatch(r"(launch|slurm|tests)/[\w./-]+", word):
                assert (ROOT / word).exists(), line
        if words[0].endswith("dist-mnist"):
            name = max(
                (key for key in commands() if tuple(words[1 : 1 + len(key)]) == key and key), key=len, default=None
            )
            assert name is not None, line
            assert options_in(words) <= commands()[name], line
            assert all(
                word.split("=")[1] in RECIPES for word in words if word.startswith("recipe=") and "{" not in word
            )
        start = next((n for n, word in enumerate(words) if any(word.endswith(s) for s in STARTS_TRAINING)), None)
        if start is not None and "multinode" not in line:
            ours = words[start + 1 :] if "sweep.sh" not in line else []
            assert options_in(ours) <= commands()[("train",)], line


@each_document
def test_options_named_in_prose_exist(document):
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    known = set().union(*commands().values()) | OF_OTHERS
    scripts = "".join(
        path.read_text() for pattern in ("launch/*", "slurm/*", "tests/*.sh", "tests/*/*.py")
        for path in ROOT.glob(pattern) if path.is_file()
    )  # fmt: skip
    for option in re.findall(r"`(--[a-z][a-z0-9-]+)", prose):
        assert option in known or option in scripts, option


@pytest.fixture
def data_in_place(digits, monkeypatch, tmp_path):
    """A working directory whose data/mnist has 600 training and 200 test images."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mnist").symlink_to(digits)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", dist_mnist.__all__)
def test_public_name_has_an_example_that_runs(name, data_in_place):
    tests = doctest.DocTestFinder(recurse=False).find(getattr(dist_mnist, name), name, globs={})
    assert tests and tests[0].examples
    runner = doctest.DocTestRunner()
    assert all(runner.run(test).failed == 0 for test in tests)


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if blocks(path, "python")], ids=name_of)
def test_python_code_runs(document, data_in_place):
    names: dict = {}
    for block in blocks(document, "python"):
        exec(block, names)
    assert "run" not in names or names["run"].result.images == 200
    assert "logits" not in names or names["logits"].shape == (250, 10)


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def test_the_map_of_the_code_names_every_folder():
    rows = [line.split("|")[1] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    named = {name.rstrip("/").split("/")[-1] for row in rows for name in re.findall(r"`([\w/]+/)`", row)}
    folders = {path.parent.name for path in (ROOT / "dist_mnist").glob("*/__init__.py")}
    assert folders - {"utils"} <= named


def test_the_catalogue_of_faults_names_tests_that_there_are():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "tests" / "README.md").read_text())
    assert len(named) > 50
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
