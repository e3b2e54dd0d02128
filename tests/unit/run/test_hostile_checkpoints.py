"""Files that pretend to be checkpoints, or are damaged ones: each is a sentence, none runs code or takes much memory.

Some are what chance makes of a file. Others are made by somebody who knows the format: their SHA-256 is right.
"""

import gzip
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from dist_mnist.config.settings import Config
from dist_mnist.evaluation.checkpoints.load import load_models
from dist_mnist.model.build import build_model
from dist_mnist.run.checkpoints.file import save_checkpoint
from dist_mnist.utils.errors import UserError
from helpers import HANGS_AFTER_S
from helpers.checkpoints import ARRAYS, CONFIG, DESCRIPTION, FACTS, INFO, forged, pack


class Bomb:
    """What a pickle does when it is read."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def tensors(*offsets_and_shapes: tuple[list, list], body: int = 8, **more: Any) -> bytes:
    """A file of F32 tensors at such offsets and with such shapes."""
    named = {
        f"model/{number}": {"dtype": "F32", "shape": shape, "data_offsets": offsets} | more
        for number, (offsets, shape) in enumerate(offsets_and_shapes)
    }
    return pack({"__metadata__": {"format": "dist_mnist/1"}} | named, b"\0" * body)


def zipped(content: bytes, name: str = "data.pkl") -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def tarred() -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as archive:
        link = tarfile.TarInfo("../../exploded")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    return file.getvalue()


def saved_by_torch() -> bytes:
    torch.save({"model": Bomb()}, file := io.BytesIO())
    return file.getvalue()


def with_settings(**changes: Any) -> bytes:
    return forged(DESCRIPTION | {"settings": CONFIG.to_json() | changes})


def with_facts(**changes: Any) -> bytes:
    return forged(DESCRIPTION | {"data": DESCRIPTION["data"] | changes})


def with_weights(**changes: np.ndarray) -> bytes:
    return forged(arrays=ARRAYS | {f"model/{name.replace('__', '.')}": value for name, value in changes.items()})


def without(key: str, info: dict = DESCRIPTION) -> dict:
    return {name: value for name, value in info.items() if name != key}


HONEST = forged()
DATA_AT = 8 + int.from_bytes(HONEST[:8], "little")
DAMAGED, NOT_OURS, SETTINGS, WEIGHTS, SAYS = (
    "is damaged or not a checkpoint", "is not a checkpoint of dist_mnist", "--|setting", "its weights do not match",
    "does not match the schema of checkpoints",
)  # fmt: skip
FILES: dict[str, tuple[bytes, str]] = {
    # other kinds of files under our name
    "a pickle": (pickle.dumps({"model": Bomb()}), DAMAGED),
    "an old pickle": (pickle.dumps(Bomb(), 0), DAMAGED),
    "torch.save": (saved_by_torch(), DAMAGED),
    "numpy.save of objects": (b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'shape': ()}" + pickle.dumps(Bomb()), DAMAGED),
    "a zip bomb": (zipped(b"\0" * 50_000_000), DAMAGED),
    "a zip with a path that leads out": (zipped(b"x", "../../exploded"), DAMAGED),
    "a gzip bomb": (gzip.compress(b"\0" * 50_000_000), DAMAGED),
    "a tar with a link that leads out": (tarred(), DAMAGED),
    "a script": (b"#!/bin/sh\nmkdir exploded\n", DAMAGED),
    "text": ("Grüße\n".encode() * 100, DAMAGED),
    "nothing": (b"", DAMAGED),
    "zeros": (b"\0" * 4096, DAMAGED),
    "somebody else's safetensors": (
        pack({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8), NOT_OURS,
    ),
    # headers
    "a huge length": (pack(b"{}", length=2**63), DAMAGED),
    "the largest length": (pack(b"{}", length=2**64 - 1), DAMAGED),
    "a length beyond the file": (pack(b"{}", length=1000), DAMAGED),
    "a huge header": (pack(b" " * (2 << 20)), DAMAGED),
    "a header of many objects": (pack(b"[" + b"{}," * 300_000 + b"{}]"), DAMAGED),
    "a deep header": (pack(b"[" * 500_000), DAMAGED),
    "a header that is no JSON": (pack(b"__import__('os').mkdir('exploded')"), DAMAGED),
    "a header that is no object": (pack(b"[1, 2]"), DAMAGED),
    "a header in latin 1": (pack('{"ü": 1}'.encode("latin1")), DAMAGED),
    "a number of many digits": (pack(b'{"a": ' + b"9" * 100_000 + b"}"), DAMAGED),
    "metadata that is no object": (pack({"__metadata__": [1]}), DAMAGED),
    "metadata that is no text": (pack({"__metadata__": {"format": 1}}), DAMAGED),
    "names that are there twice": (pack(b'{"__metadata__": {"format": "dist_mnist/1"}, "a": 1, "a": 2}'), DAMAGED),
    "keys of the metadata that are there twice": (
        HONEST.replace(b'{"format": "dist_mnist/1"', b'{"format":"x","format":"dist_mnist/1"').replace(
            HONEST[:8], (DATA_AT - 8 + 12).to_bytes(8, "little"), 1
        ), DAMAGED,
    ),
    # tensors
    "overlapping tensors": (tensors(([0, 8], [2]), ([4, 8], [1])), DAMAGED),
    "a gap between tensors": (tensors(([0, 4], [1]), ([8, 12], [1]), body=12), DAMAGED),
    "bytes before the first tensor": (tensors(([4, 8], [1])), DAMAGED),
    "an offset beyond 2^64": (tensors(([0, 2**70], [2])), DAMAGED),
    "an offset below zero": (tensors(([-8, 0], [2])), DAMAGED),
    "an end before the start": (tensors(([8, 0], [2])), DAMAGED),
    "a shape beyond 2^64": (tensors(([0, 8], [2**40, 2**40])), DAMAGED),
    "a side below zero": (tensors(([0, 8], [-1, -2])), DAMAGED),
    "a side that is no whole number": (tensors(([0, 8], [2.0])), DAMAGED),
    "a shape that is no list": (tensors(([0, 8], 2)), DAMAGED),
    "offsets that are three": (tensors(([0, 4, 8], [2])), DAMAGED),
    "a dtype that is unknown": (tensors(([0, 8], [2]), dtype="O"), DAMAGED),
    "a tensor without a dtype": (pack({"w": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8), DAMAGED),
    "a body that is too short": (HONEST[:-1], DAMAGED),
    "a body that is too long": (HONEST + b"\0", DAMAGED),
    "a flipped bit": (HONEST[:-1] + bytes([HONEST[-1] ^ 1]), DAMAGED),
    "a sum of something else": (forged(sha256="0" * 64), DAMAGED),
    # formats and descriptions
    "a future format": (forged(format="dist_mnist/2"), "another version of dist_mnist.*'dist_mnist/2'"),
    "another program's format": (forged(format="pt"), NOT_OURS),
    "a description that is no JSON": (forged(text="__import__('os').mkdir('exploded')"), SAYS),
    "a description that is no object": (forged(text="[1]"), SAYS),
    "a deep description": (forged(text="[" * 200_000), SAYS),
    "a description with names twice": (forged(text='{"step": 1, "step": 2}'), SAYS),
    "a step of many digits": (forged(text='{"step": ' + "9" * 10_000 + "}"), SAYS),
    "no description": (forged({}), SAYS),
    "no step": (forged(without("step")), SAYS),
    "no settings": (forged(without("settings")), SAYS),
    "no data": (forged(without("data")), SAYS),
    "settings that are a list": (forged(DESCRIPTION | {"settings": [1]}), SAYS),
    "a step that is text": (forged(DESCRIPTION | {"step": "5; rm -rf /"}), SAYS),
    "a step below zero": (forged(DESCRIPTION | {"step": -1}), SAYS),
    "a step that is true": (forged(DESCRIPTION | {"step": True}), SAYS),
    "a step beyond 2^64": (forged(DESCRIPTION | {"step": 2**70}), SAYS),
    "an epoch of 400 digits": (forged(DESCRIPTION | {"epoch": 10**400}), SAYS),
    "a learning rate of 400 digits": (with_settings(lr=10**400), SETTINGS),
    "a description of half a character": (
        pack({"__metadata__": {"format": "dist_mnist/1", "info": "\ud800", "info_sha256": "", "sha256": ""}}), DAMAGED,
    ),
    "a folder of half a character": (with_facts(folder="\ud800"), SAYS),
    "a setting of half a character": (with_settings(recipe="\ud800"), SAYS),
    "an accuracy beyond all": (forged(DESCRIPTION | {"validation": {"accuracy": 1.5, "loss": 0.1}}), SAYS),
    "a tensor of a thousand dimensions": (tensors(([0, 4], [1] * 1000)), DAMAGED),
    "an epoch without end": (forged(DESCRIPTION | {"epoch": float("inf")}), SAYS),
    "an accuracy that is text": (forged(DESCRIPTION | {"validation": {"accuracy": "1", "loss": 0.1}}), SAYS),
    "a validation that is a list": (forged(DESCRIPTION | {"validation": [1]}), SAYS),
    "a ledger that is text": (forged(DESCRIPTION | {"ledger": "1234"}), SAYS),
    "a ledger beyond 2^64": (forged(DESCRIPTION | {"ledger": [0, 0, 0, 2**64]}), SAYS),
    "a meter of two": (forged(DESCRIPTION | {"meter": [1.0, 2.0]}), SAYS),
    "data without a folder": (forged(DESCRIPTION | {"data": without("folder", DESCRIPTION["data"])}), SAYS),
    "an image of two sides": (with_facts(image_shape=[8, 8]), SAYS),
    "an image of a million pixels a side": (with_facts(image_shape=[1, 10**6, 10**6]), SAYS),
    "an image of no pixels": (with_facts(image_shape=[1, 0, 8]), SAYS),
    "an image whose sides are text": (with_facts(image_shape=["1", "8", "8"]), SAYS),
    "a billion classes": (with_facts(num_classes=10**9), SAYS),
    "no class": (with_facts(num_classes=0), SAYS),
    "other classes": (with_facts(num_classes=4), WEIGHTS),
    "other images": (with_facts(image_shape=[1, 16, 16]), WEIGHTS),
    # settings
    "a setting that is unknown": (with_settings(shell="rm"), SETTINGS),
    "a setting out of its limits": (with_settings(lr=-1.0), SETTINGS),
    "a setting that is no number": (with_settings(lr=float("nan")), SAYS),
    "a setting of another type": (with_settings(conv_channels="64"), SETTINGS),
    "channels of many digits": (with_settings(conv_channels=[2**62]), SETTINGS),
    "a million units": (with_settings(dense_units=[1_000_000, 1_000_000]), SETTINGS),
    "units beyond all memory": (with_settings(dense_units=[65_536] * 100), WEIGHTS),
    "a million layers": (with_settings(dense_units=[1] * 100_000), SETTINGS),
    "a million convolutions": (with_settings(conv_layers=1_000_000), SETTINGS),
    "more stages than pixels": (with_settings(conv_channels=[2] * 40), SETTINGS),
    "another architecture": (with_settings(conv_channels=[3]), WEIGHTS),
    # weights
    "no weights": (forged(arrays={}), WEIGHTS),
    "weights that are not a number": (with_weights(head__bias=np.full(3, np.nan, np.float32)), "are NaN or infinite"),
    "weights without end": (with_weights(head__bias=np.full(3, np.inf, np.float32)), "are NaN or infinite"),
    "weights that are too many": (with_weights(other=np.zeros(3, np.float32)), WEIGHTS),
    "weights of another shape": (with_weights(head__bias=np.zeros((3, 1), np.float32)), WEIGHTS),
}  # fmt: skip


def test_load_models_absent_optional_keys_are_none(here, alone):
    path = here(forged({name: value for name, value in DESCRIPTION.items() if value is not None}))
    [trained] = load_models([path], alone)
    assert trained.info == INFO


def refused(path: Path, world: Any) -> str:
    """The sentence that a file is refused with."""
    with pytest.raises(UserError) as caught:
        load_models([path], world)
    return str(caught.value)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Iterator[Callable[[bytes], Path]]:
    """Writes a checkpoint; afterwards nothing else may be there."""
    monkeypatch.chdir(tmp_path)

    def write(content: bytes) -> Path:
        (tmp_path / "step-00000005.safetensors").write_bytes(content)
        return tmp_path / "step-00000005.safetensors"

    yield write
    assert os.listdir(tmp_path) == ["step-00000005.safetensors"], "something was run, or written"


def test_load_models_honest_forgery_is_loaded(here, alone, tmp_path):
    path = here(HONEST)
    [trained] = load_models([path], alone)
    assert trained.info == INFO and trained.network.num_parameters() > 0
    save_checkpoint(path, ARRAYS, INFO)
    [again] = load_models([path], alone)
    networks = (each.network.parameters() for each in (trained, again))
    assert all(torch.equal(one, other) for one, other in zip(*networks, strict=True))


@pytest.mark.parametrize("name", FILES)
def test_load_models_hostile_file_is_refused_with_a_sentence(here, alone, name):
    content, sentence = FILES[name]
    path = here(content)
    said = refused(path, alone)
    assert path.name in said and len(said) < 1000
    assert re.search(sentence, said), said


MEASURE = """
import sys
from pathlib import Path
from dist_mnist.distributed.world import World
from dist_mnist.utils.errors import UserError
from dist_mnist.evaluation.checkpoints.load import load_models

world = World.from_environment()
peak = lambda: Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
for path in sorted(Path(sys.argv[1]).iterdir()):
    before = peak()
    try:
        load_models([path], world)
    except UserError:
        pass
    print(path.name, before, peak())
"""


def test_load_models_hostile_files_take_no_more_memory_than_twice_an_honest_one(tmp_path):
    """Of a network of usual size; the hostile ones come after it, and do not raise the peak by as much again."""
    config = Config(conv_channels=(32, 64))
    model = build_model(config, (1, 28, 28), 10)
    arrays = {f"{part}/{name}": value.numpy() for part in ("model", "average", "optimizer/momentum")
              for name, value in model.state_dict().items()}  # fmt: skip
    info = replace(INFO, settings=config.to_json(), data=replace(FACTS, image_shape=(1, 28, 28), num_classes=10))
    save_checkpoint(tmp_path / "000", {name: np.array(array, order="C") for name, array in arrays.items()}, info)
    for number, (content, _) in enumerate(FILES.values(), start=1):
        (tmp_path / f"{number:03}").write_bytes(content)
    command = [sys.executable, "-c", MEASURE, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S, check=True)
    first, *_, last = [[int(word) for word in line.split()[1:]] for line in done.stdout.splitlines()]
    honest = first[1] - first[0]
    assert len(done.stdout.splitlines()) == len(FILES) + 1 and honest > 0
    assert last[1] - first[0] < 2 * honest, "KB of memory"


UNSAFE = re.compile(
    r"(?:import|from) (?:c?pickle|dill|shelve|marshal|joblib)\b|\b(?:c?pickle|dill|shelve|marshal|joblib)\.\w+\(|"
    r"allow_pickle=True|(?<![.\w])(?:eval|exec|compile)\(|(?<!safetensors\.)\b(?:torch|np|numpy|jit)\.load\("
    r"|_object(?:_list)?\(|os\.system|shell=True|yaml\.load\("
)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[3] / "dist_mnist").rglob("*.py")), ids=lambda path: path.name
)
def test_package_source_has_no_call_that_makes_code_of_data(path):
    lines = enumerate(path.read_text().splitlines(), start=1)
    assert [(number, line) for number, line in lines if UNSAFE.search(line.split("#")[0])] == []


def test_search_for_unsafe_calls_finds_them():
    found = (
        "import pickle",
        "pickle.loads(data)",
        "from marshal import load",
        "np.lib.f(x, allow_pickle=True)",
        "x = eval(text)",
        "torch.load(path)",
        "dist.all_gather_object(a, b)",
        "np.load(file)",
    )
    assert all(UNSAFE.search(line) for line in found) and not UNSAFE.search("network.eval()")
