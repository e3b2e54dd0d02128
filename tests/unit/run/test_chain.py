"""The chain of a run's checkpoints: what it holds, and which changes it shows."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from dist_mnist.config.resolve import resolve
from dist_mnist.config.settings import Config
from dist_mnist.run.checkpoints.chain import Chain
from dist_mnist.run.checkpoints.file import arrays_digest, load_checkpoint, save_checkpoint
from dist_mnist.run.checkpoints.store import CheckpointStore, verify
from dist_mnist.run.records import CheckpointInfo
from dist_mnist.utils.errors import UserError
from helpers.checkpoints import CONFIG, INFO

STEPS = (5, 10, 15, 20)


def described(step: int, config: Config = CONFIG) -> CheckpointInfo:
    return replace(INFO, step=step, settings=config.to_json(), settings_sha256=config.sha256())


def arrays(step: int) -> dict[str, np.ndarray]:
    return {"model/w": np.full(3, step, np.float32)}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with four checkpoints."""
    store = CheckpointStore(tmp_path / "checkpoints")
    store.folder.mkdir()
    for step in STEPS:
        store.save(arrays(step), described(step))
    return tmp_path


def faults(run: Path) -> dict[int, str]:
    """What `verify` finds, by step."""
    return {int(row.file[5:13]): row.fault for row in verify(run) if row.fault}


def forge(run: Path, at: int, found_arrays: dict | None = None, **changes: object) -> None:
    """Change a checkpoint, and make its SHA-256 right again."""
    path = CheckpointStore(run / "checkpoints").path(at)
    before = load_checkpoint(path)
    save_checkpoint(path, before.arrays if found_arrays is None else found_arrays, replace(before.info, **changes))


def test_chain_of_an_honest_run_leads_from_each_checkpoint_to_the_first(run):
    links = Chain(run).links
    assert [link.step for link in links] == list(STEPS)
    assert [link.parent for link in links] == [None, *(link.sha256 for link in links[:-1])]
    assert [link.arrays_sha256 for link in links] == [arrays_digest(arrays(step)) for step in STEPS]
    assert faults(run) == {}


def test_pruned_checkpoints_leave_their_links(run):
    store = CheckpointStore(run / "checkpoints")
    for step in (5, 10):
        store.path(step).unlink()
    assert faults(run) == {}
    assert len(Chain(run).links) == 4


def test_resumed_run_goes_on_with_the_chain(run):
    store = CheckpointStore(run / "checkpoints")
    assert store.newest()
    store.save(arrays(25), described(25))
    assert [link.step for link in Chain(run).links] == [*STEPS, 25]
    assert faults(run) == {}


def test_run_that_goes_on_from_an_earlier_checkpoint_is_a_branch_of_the_chain(run):
    store = CheckpointStore(run / "checkpoints")
    store.path(20).write_bytes(b"damaged")
    found = store.newest(lambda text: None)
    assert found and found.info.step == 15
    store.save(arrays(20), replace(described(20), epoch=2.0))
    first, second = (link for link in Chain(run).links if link.step == 20)
    assert first.parent == second.parent == found.sha256 and first.sha256 != second.sha256
    assert faults(run) == {}


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ({"steps": 20}, {"steps": 30}, True),
        ({"steps": 20}, {"steps": 30, "warmup_fraction": 0.1}, False),
        ({"model": "here/mine.py:Net"}, {"model": "there/mine.py:Net"}, True),
        ({"model": "here/mine.py:Net"}, {"model": "here/mine.py:Other"}, False),
    ],
)
def test_settings_that_a_resumed_run_may_change_are_not_in_their_digest(before, after, same):
    constant = {"schedule": "constant", "warmup_fraction": 0, "crop": 0}
    first, second = (resolve({"recipe": "notebook", **constant, **changes}) for changes in (before, after))
    assert (first.sha256() == second.sha256()) is same


def test_checkpoint_under_the_name_of_another_step_is_named(run):
    store = CheckpointStore(run / "checkpoints")
    store.path(10).rename(store.path(30))
    assert faults(run) == {30: "its content is the checkpoint of step 10"}


def test_line_that_its_writer_did_not_finish_is_replaced(run):
    path = Chain(run).path
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[0][:40])
    assert len(Chain(run).links) == 4
    store = CheckpointStore(run / "checkpoints")
    store.newest()
    store.save(arrays(25), described(25))
    assert path.read_bytes().startswith(whole) and len(Chain(run).links) == 5


def test_link_of_a_checkpoint_whose_writer_was_killed_before_it_is_made_up_for(run):
    path = Chain(run).path
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    assert set(faults(run)) == {20}
    CheckpointStore(run / "checkpoints").newest()
    assert path.read_bytes() == b"".join(lines) and faults(run) == {}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"found_arrays": arrays(11)}, "its arrays do not match the digest in its description"),
        (
            {"found_arrays": arrays(11), "arrays_sha256": arrays_digest(arrays(11))},
            "chain.jsonl has another checkpoint of step 10",
        ),
        ({"settings": {**CONFIG.to_json(), "seed": 7}}, "its settings do not match the digest in its description"),
        ({"parent": "00" * 32}, "chain.jsonl has another checkpoint of step 10"),
        ({"step": 12}, "its content is the checkpoint of step 12"),
        ({"arrays_sha256": None}, "it has no digests for the chain, unlike the run's other checkpoints"),
    ],
)
def test_verify_names_a_checkpoint_that_was_changed_with_its_sha256(run, change, told):
    forge(run, 10, **change)
    assert faults(run) == {10: told}


def test_verify_names_what_follows_a_missing_link(run):
    lines = Chain(run).path.read_bytes().splitlines(keepends=True)
    Chain(run).path.write_bytes(lines[0] + b"".join(lines[2:]))
    told = "chain.jsonl lacks the predecessor of step 15"
    assert faults(run) == {10: "it is not in chain.jsonl", 15: told, 20: told}


def test_verify_names_a_checkpoint_that_follows_other_settings(run):
    store = CheckpointStore(run / "checkpoints")
    store.newest()
    store.save(arrays(25), described(25, Config(conv_channels=(2,), dense_units=(4,), kernel_size=3, seed=9)))
    assert faults(run) == {25: "it follows step 20, which was trained with other settings"}


def test_run_of_a_version_without_a_chain_is_no_fault(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path / "checkpoints" / "step-00000005.safetensors", arrays(5), INFO)
    assert faults(tmp_path) == {}


def test_run_with_a_damaged_chain_sets_it_aside_and_goes_on(run):
    Chain(run).path.write_text("damaged\n")
    store, told = CheckpointStore(run / "checkpoints"), list[str]()
    assert store.newest(told.append)
    assert "cannot be read" in told[0] and "set aside as chain.damaged" in told[0]
    assert (run / "chain.damaged").read_text() == "damaged\n"
    store.save(arrays(25), described(25))
    assert [link.step for link in Chain(run).links] == [20, 25]
    assert faults(run)[25] == "chain.jsonl lacks the predecessor of step 20"


def test_chain_that_no_run_wrote_is_a_sentence(run):
    Chain(run).path.write_text('{"step": "five"}\n')
    with pytest.raises(UserError, match=r"chain\.jsonl cannot be read, as its content is invalid"):
        verify(run)
