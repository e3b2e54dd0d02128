"""`dist-mnist data suspects`: flipped labels are found by real fold runs, which resume; evaluation of such a fold."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_mnist.data.sources.synthetic import make_digits
from helpers.runs import dist_mnist, trained_here

pytestmark = pytest.mark.xdist_group("suspects")  # what both need is made once
FLIPPED = np.arange(7, 600, 50)
FOLDS = 2


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> tuple[Path, str]:
    """The folder of the result, and what was said, of a run on 600 generated digits, 12 of them with other labels."""
    from dist_mnist.data.idx import write_idx

    folder = tmp_path_factory.mktemp("flipped")
    for split, name, count in (("train", "train", 600), ("test", "t10k", 100)):
        images, labels = make_digits(count, seed=3, split=split)
        if split == "train":
            labels[FLIPPED] = (labels[FLIPPED] + 3) % 10
        write_idx(folder / f"{name}-images-idx3-ubyte", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels)
    run = trained_here(folder, folder / "run", "--steps=1", "--validation-fraction=0")
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= {"steps": 150, "dropout": 0.0, "rotate": 0.0, "scale": 0.0}
    (run / "config.json").write_text(json.dumps(config))
    done = dist_mnist("data", "suspects", run, f"--folds={FOLDS}", "--nproc=1")
    assert done.returncode == 0, done.stderr
    return folder / "run-suspects", done.stdout


def test_suspects_of_flipped_labels_are_these(searched):
    folder, said = searched
    found = json.loads((folder / "suspects.json").read_text())
    assert (found["images"], found["folds"]) == (600, FOLDS) and found["held_out_accuracy"] > 0.7
    first = [one["index"] for one in found["suspects"][:12]]
    assert len(set(first) & set(FLIPPED.tolist())) >= 9, first
    rows = list(csv.DictReader((folder / "suspects.csv").open()))
    assert [int(row["index"]) for row in rows] == [one["index"] for one in found["suspects"]]
    margins = [one["margin"] for one in found["suspects"]]
    assert margins == sorted(margins) and all(0 <= one["self_confidence"] <= 1 for one in found["suspects"])
    assert min(Image.open(folder / "suspects.png").size) > 100
    assert f"{len(rows)} of 600 labels are suspicious" in said and str(folder / "suspects.csv") in said


def test_suspects_given_again_trains_only_what_is_missing(searched):
    folder, _ = searched
    before = (folder / "suspects.json").read_bytes()
    first, second = (folder / f"validation_fold={fold + 1}_{FOLDS}" for fold in range(FOLDS))
    kept = (first / "result.json").stat().st_mtime_ns
    shutil.rmtree(second)
    done = dist_mnist("data", "suspects", folder.with_name("run"), f"--folds={FOLDS}", "--nproc=1")
    assert done.returncode == 0 and second.is_dir(), done.stderr
    assert (folder / "suspects.json").read_bytes() == before and (first / "result.json").stat().st_mtime_ns == kept


def test_eval_of_a_fold_run_knows_its_fold(searched):
    folder, _ = searched
    done = dist_mnist("eval", f"--ckpt={folder / 'validation_fold=1_2'}", "--split=validation", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["images"] == 300, done.stderr


def test_suspects_of_what_is_no_run_is_refused(tmp_path):
    done = dist_mnist("data", "suspects", tmp_path)
    assert done.returncode == 2 and "is not a run directory" in done.stderr
