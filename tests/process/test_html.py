"""`dist-mnist report`: what the page of real runs says, and that it needs nothing but itself."""

import base64
import io
import json
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from helpers.browser import browser, find_browser
from helpers.runs import dist_mnist

pytestmark = pytest.mark.xdist_group("compare")  # with whose tests these share their runs
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """The text, the pictures and all that a browser would fetch or follow."""

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.pictures, self.elsewhere, self.tags = "", [], [], set()
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "data") and not value.startswith("#"):
                (self.pictures if value.startswith("data:image/") else self.elsewhere).append(value)

    def handle_data(self, data):
        self.text += data

    def decoded(self, kind: str) -> list[bytes]:
        begins = f"data:image/{kind};base64,"
        return [base64.b64decode(one[len(begins) :]) for one in self.pictures if one.startswith(begins)]


@pytest.fixture(scope="module")
def page(finished_runs) -> Page:
    done = dist_mnist("report", finished_runs[0])
    assert (done.returncode, done.stdout) == (0, f"{finished_runs[0] / 'report.html'}\n"), done.stderr
    return Page(finished_runs[0] / "report.html")


def test_report_page_needs_nothing_but_itself(page):
    assert page.elsewhere == [] and not page.tags & {"script", "link", "iframe", "object", "embed", "form"}


def test_report_page_has_the_figures_of_the_run(page, finished_runs):
    result = json.loads((finished_runs[0] / "result.json").read_text())
    assert f"{result['accuracy']:.2%} accuracy on 200 test images" in page.text
    assert f"loss {result['loss']:.4f}" in page.text
    matrix = result["confusion_matrix"]
    for number, counts in enumerate(matrix):
        recall = "-" if not sum(counts) else f"{counts[number] / sum(counts):.2%}"
        predicted = sum(row[number] for row in matrix)
        precision = "-" if not predicted else f"{matrix[number][number] / predicted:.2%}"
        assert f"{number}{sum(counts)}{recall}{precision}" in page.text.replace(" ", "")
    for name, form in (("macro_f1", ".2%"), ("auc", ".5f"), ("ece", ".2%"), ("brier", ".4f"), ("temperature", ".3f")):
        assert format(result[name], form) in page.text
    config = json.loads((finished_runs[0] / "config.json").read_text())
    assert config["data"]["fingerprint"] in page.text and config["machine"]["device"] in page.text
    assert all(version in page.text for version in config["versions"].values())


def test_report_page_curves_and_pictures_are_valid(page):
    curves = [ElementTree.fromstring(one) for one in page.decoded("svg+xml")]
    assert len(curves) == 5, "four of training, and the reliability curve"
    assert all(
        len([path for path in one.iter(f"{SVG}g") if path.get("id", "").startswith("line2d")]) > 4 for one in curves
    )
    confusion, mistakes = (Image.open(io.BytesIO(one)) for one in page.decoded("png"))
    assert min(*confusion.size, *mistakes.size) > 100 and confusion.size != mistakes.size


@pytest.mark.skipif(find_browser() is None, reason="needs Chromium, or Chrome")
def test_report_page_is_dark_on_a_dark_screen_and_as_wide_as_a_phone(page, finished_runs, tmp_path):
    with browser(find_browser(), tmp_path / "profile") as tab:
        tab.send("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        tab.open((finished_runs[0] / "report.html").as_uri())
        grounds = []
        for scheme in ("light", "dark"):
            tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            grounds.append(tab.run("getComputedStyle(document.body).backgroundColor"))
        assert grounds == ["rgb(255, 255, 255)", "rgb(22, 24, 27)"]
        assert "invert" in tab.run("getComputedStyle(document.querySelector('.drawn')).filter")
        assert tab.run("document.documentElement.scrollWidth") == 390


def test_report_page_command_makes_the_same_run(page, finished_runs):
    """Settings that differed from the run's would be refused in its folder."""
    [command] = [line for line in page.text.split("All settings") if "dist-mnist train" in line]
    words = shlex.split(command[command.index("dist-mnist train") :])
    assert "--lr=0.1" not in words and "--steps=30" in words and not any("run-dir" in word for word in words)
    done = dist_mnist(*words[1:], "--dry-run", "--run-dir", finished_runs[0])
    assert (done.returncode, done.stdout) == (0, f"{finished_runs[0]}\n"), done.stderr
    other = dist_mnist(*words[1:], "--dry-run", "--run-dir", finished_runs[2])
    assert other.returncode == 2 and "lr: 0.02 -> 0.1" in other.stderr


def test_report_two_runs_compares_them(finished_runs, tmp_path):
    done = dist_mnist("report", *finished_runs[:2], "--output", tmp_path / "both.html")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'both.html'}\n"), done.stderr
    page = Page(tmp_path / "both.html")
    accuracies = [json.loads((path / "result.json").read_text())["accuracy"] for path in finished_runs[:2]]
    assert all(f"{accuracy:.2%}" in page.text for accuracy in accuracies)
    assert all(path.name in page.text for path in finished_runs[:2])
    contest = json.loads(dist_mnist("compare", *finished_runs[:2], "--json").stdout)["contest"]
    assert f"only the first {contest['only_first']}, only the second {contest['only_second']}" in page.text


def test_report_unfinished_run_of_strange_name_makes_a_page(finished_runs, tmp_path):
    strange = tmp_path / "<script>alert(1)<"
    shutil.copytree(finished_runs[0], strange)
    (strange / "result.json").unlink()
    assert dist_mnist("report", strange).returncode == 0
    page = Page(strange / "report.html")
    assert "script" not in page.tags and strange.name in page.text
    assert "This run is not finished; its last metrics are from step 30." in page.text and len(page.pictures) == 4


def test_report_without_test_images_says_why(finished_runs, tmp_path):
    done = dist_mnist("report", finished_runs[0], "--output", tmp_path / "page.html", "--data-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    page = Page(tmp_path / "page.html")
    assert "The mistakes cannot be shown:" in page.text and str(tmp_path) in page.text and len(page.decoded("png")) == 1


def test_report_unreadable_or_unwritable_is_refused(finished_runs, tmp_path):
    done = dist_mnist("report", tmp_path)
    assert done.returncode == 2 and f"{tmp_path} is not a run directory" in done.stderr
    done = dist_mnist("report", finished_runs[0], "--output", tmp_path / "nowhere" / "page.html")
    assert done.returncode == 2 and "the page cannot be written" in done.stderr and "Traceback" not in done.stderr
