"""The README against the program: what it names exists, and what exists is named."""

import re
from pathlib import Path

import pytest

from dist_mnist.config.recipes import RECIPES
from dist_mnist.config.settings import FIELDS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
RUN_OPTIONS = {
    "--nproc", "--max-restarts", "--stop-code", "--nnodes", "--rdzv-endpoint", "--rdzv-id", "--dry-run", "--config",
    "--print-config",
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_in_the_table_of_options(name):
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| {FIELDS[name].group} |"))
    assert f"`{FIELDS[name].option}`" in row


def test_every_option_named_there_is_an_option():
    tables = [line for line in TEXT.splitlines() if line.startswith("|")]
    named = set(re.findall(r"`(--[a-z0-9-]+)", "\n".join(tables)))
    assert named <= {field.option for field in FIELDS.values()} | RUN_OPTIONS


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_described(recipe):
    assert f"| `{recipe}` | {RECIPES[recipe].about} |" in TEXT


@pytest.mark.parametrize("link", [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link])
def test_links_and_pictures_resolve(link):
    assert (ROOT / link).exists()


def test_the_code_runs(digits, monkeypatch, tmp_path):
    training, loop = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mnist").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(training, names)
    assert names["run"].result.images == 200
    exec(loop, names)
    assert names["logits"].shape == (250, 10) and len(names["batch"].ids.unique()) == 250


def test_the_annotated_tree_names_every_module():
    tree = TEXT.split("## An image's way through the code")[1].split("```")[1]
    modules = {path.stem for path in (ROOT / "dist_mnist").rglob("*.py")} - {"__init__", "__main__"}
    assert {name for name in modules if not re.search(rf"\b{name}\b", tree)} == set()


def test_the_catalogue_of_faults_names_tests_that_there_are():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "tests" / "README.md").read_text())
    assert len(named) > 50
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
