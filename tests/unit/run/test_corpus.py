"""The cases that the fuzzer has found worth keeping: each is still an array, a checkpoint, or a sentence."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "sweeps"))
from fuzz import TARGETS, cases


@pytest.mark.parametrize("target", TARGETS)
def test_fuzz_target_case_of_corpus_keeps_its_promise(target, tmp_path):
    assert len(cases(target)) > 10
    for case in cases(target):
        try:
            TARGETS[target](case, tmp_path)
        except Exception as error:
            error.add_note(f"with {case.hex()}")
            raise
