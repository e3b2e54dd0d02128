"""Checkpoints of a small network, genuine and forged."""

import hashlib
import json
from typing import Any

import numpy as np

from dist_mnist.config.settings import Config
from dist_mnist.model.build import build_model
from dist_mnist.run.checkpoints.file import _digest
from dist_mnist.run.records import CheckpointInfo, DataFacts
from dist_mnist.utils.files import to_json

CONFIG = Config(conv_channels=(2,), dense_units=(4,), kernel_size=3)
FACTS = DataFacts(folder="data", fingerprint="0" * 16, image_shape=(1, 8, 8), num_classes=3)
INFO = CheckpointInfo(settings=CONFIG.to_json(), data=FACTS, step=5, epoch=1.0)
DESCRIPTION: dict[str, Any] = json.loads(to_json(INFO))  # as in a file, as a basis for forgeries
ARRAYS = {
    f"model/{name}": np.array(value.numpy(), order="C")
    for name, value in build_model(CONFIG, (1, 8, 8), 3).state_dict().items()
}


def pack(header: dict | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with any header and body."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def forged(info: Any = DESCRIPTION, arrays: dict = ARRAYS, text: str | None = None, **metadata: Any) -> bytes:
    """Return a checkpoint file of valid format and with valid digests, but arbitrary content."""
    text = json.dumps(info) if text is None else text
    header: dict = {}
    body = b""
    for name, array in arrays.items():
        kind = {"f": "F", "i": "I", "u": "U", "b": "BOOL"}[array.dtype.kind]
        dtype = kind if kind == "BOOL" else f"{kind}{8 * array.itemsize}"
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(body), len(body) + array.nbytes]}
        body += array.tobytes()
    sums = {"info_sha256": hashlib.sha256(text.encode()).hexdigest(), "sha256": _digest(arrays, text)}
    return pack({"__metadata__": {"format": "dist_mnist/1", "info": text} | sums | metadata} | header, body)
