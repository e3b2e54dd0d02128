"""Checkpoints: what is loaded is what was saved, or an error says that it is not."""

import os
import pickle
import random

import numpy as np
import pytest
from msgspec.structs import replace

from dist_mnist.run.checkpoints.file import (
    CheckpointError,
    evaluated_weights,
    load_checkpoint,
    part_of,
    read_info,
    save_checkpoint,
)
from dist_mnist.run.records import ValidationScore
from dist_mnist.utils.errors import UserError
from helpers.checkpoints import DESCRIPTION, INFO, forged

ARRAYS = {
    "model/w": np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32),
    "model/count": np.array(7, np.int64),
    "average/w": np.zeros((0, 3), np.float64),
    "optimizer/mask": np.array([True, False, True]),
    "optimizer/bytes": np.arange(11, dtype=np.uint8),
}
SAVED = replace(
    INFO, step=12, epoch=1.5, validation=ValidationScore(accuracy=0.5, loss=1.25), ledger=(1, -(2**63), 3, 4),
    meter=(1.5, None, 250.0), versions={"python": "3"},
)  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path / "x.safetensors", ARRAYS, SAVED)
    return tmp_path / "x.safetensors"


def same(checkpoint) -> bool:
    pairs = [(checkpoint.arrays.get(name), expected) for name, expected in ARRAYS.items()]
    equal = all(found.dtype == expected.dtype and np.array_equal(found, expected) for found, expected in pairs)
    return checkpoint.info == SAVED and len(checkpoint.arrays) == len(ARRAYS) and equal


def test_checkpoint_saved_loads_as_it_was(saved):
    checkpoint = load_checkpoint(saved)
    assert same(checkpoint) and checkpoint.path == saved
    assert [checkpoint.arrays[name].shape for name in ARRAYS] == [array.shape for array in ARRAYS.values()]
    assert read_info(saved) == SAVED
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3).T, np.arange(9.0)[::2], np.arange(3, dtype=">f4")],
    ids=["transposed", "strided", "big-endian"],
)  # fmt: skip
def test_save_checkpoint_array_of_any_layout_loads_or_is_refused(tmp_path, array):
    try:
        save_checkpoint(tmp_path / "x.safetensors", {"a": array}, SAVED)
    except ValueError:
        assert not (tmp_path / "x.safetensors").exists()
    else:
        np.testing.assert_array_equal(load_checkpoint(tmp_path / "x.safetensors").arrays["a"], array)


def test_save_checkpoint_on_full_disk_keeps_old_file(saved, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(saved, {}, SAVED)
    assert same(load_checkpoint(saved)) and os.listdir(saved.parent) == [saved.name]


def damage(content: bytes):
    """1 000 single bits: those of the header's first part, of its padding, and others anywhere; and cuts."""
    rng = random.Random(0)
    data_at = 8 + int.from_bytes(content[:8], "little")
    places = [*range(8 * 60), *range(8 * (data_at - 20), 8 * (data_at + 4))]
    for bit in [*places, *(rng.randrange(8 * len(content)) for _ in range(1_000 - len(places)))]:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        yield content[:length]
    yield content + b"\0"


def test_load_checkpoint_flipped_bit_or_cut_is_refused(saved):
    for damaged in damage(saved.read_bytes()):
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=saved.name):
            load_checkpoint(saved)


@pytest.mark.parametrize("key", ["info", "sha256", "format"])
def test_load_checkpoint_damaged_metadata_key_is_refused(saved, key):
    content = saved.read_bytes()
    assert content.count(f'"{key}"'.encode()) == 1
    saved.write_bytes(content.replace(f'"{key}"'.encode(), f'"{key[:-1]}~"'.encode()))
    with pytest.raises(CheckpointError):
        load_checkpoint(saved)


def test_read_info_damaged_description_is_refused(saved):
    saved.write_bytes(saved.read_bytes().replace(b'\\"epoch\\": 1.5', b'\\"epoch\\"; 1.5'))
    for read in (load_checkpoint, read_info):
        with pytest.raises(CheckpointError):
            read(saved)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_load_checkpoint_pickle_is_refused_and_not_run(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    saved.write_bytes(pickle.dumps({"w": Bomb()}))
    for read in (load_checkpoint, read_info):
        with pytest.raises(CheckpointError, match="is damaged or not a checkpoint: its header cannot be read"):
            read(saved)
    assert not (tmp_path / "exploded").exists()


def test_load_checkpoint_other_file_is_named_in_error(tmp_path):
    import safetensors.numpy

    safetensors.numpy.save_file({"w": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError, match="is not a checkpoint of dist_mnist: expected format 'dist_mnist/1', found None"
    ):
        load_checkpoint(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="there is no such checkpoint") as caught:
        load_checkpoint(tmp_path / "absent")
    assert not isinstance(caught.value, CheckpointError), "what cannot be read is not damaged"


def test_part_of_and_evaluated_weights_choose_by_prefix():
    values = {"model/a": 1, "model/b": 2, "average/a": 3, "optimizer/m/a": 4}
    assert part_of(values, "optimizer") == {"m/a": 4}
    assert evaluated_weights(values) == {"a": 3, "b": 2}  # b is not averaged: a counter, say


def test_save_checkpoint_description_outside_schema_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"does not match the schema of checkpoints.*>= 0.*step"):
        save_checkpoint(tmp_path / "x.safetensors", ARRAYS, replace(INFO, step=-1))
    assert not list(tmp_path.iterdir())


def test_read_info_key_of_another_version_is_left_out(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(forged(DESCRIPTION | {"later": {"a": [1]}}))
    assert read_info(tmp_path / "x.safetensors") == INFO
