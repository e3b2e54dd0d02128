"""Export of a checkpoint's model for other programs: raw pixel values in, logits out.

The exported file gets its final name only after its logits have been compared with the original's on real test images,
in batches of several sizes.
"""

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from msgspec import Struct

from dist_mnist.config.resolve import from_json
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.distributed.world import World
from dist_mnist.evaluation.checkpoints.load import TrainedModel, load_models, with_code_given
from dist_mnist.evaluation.checkpoints.split import open_split
from dist_mnist.evaluation.choices import ExportFormat, Split
from dist_mnist.model.build import build_model
from dist_mnist.model.classifier import Classifier
from dist_mnist.run.network import read_safetensors
from dist_mnist.run.records import DataFacts
from dist_mnist.utils.errors import UserError, short
from dist_mnist.utils.files import sync_folder, to_json
from dist_mnist.utils.schema import parse

BATCHES = (1, 7, 200)  # batch sizes in which an exported network is checked
TOLERANCE = 1e-4  # largest difference of logits, as a fraction of the largest logit
CLASS_NAMES = "class_names"  # metadata key: the class names, a JSON list in the order of the logits
CHECKPOINT = "checkpoint_sha256"  # metadata key: the checkpoint's SHA-256, as in its run's chain
ANY_BATCH = {0: torch.export.Dim("batch")}
Predict = Callable[[np.ndarray], np.ndarray]  # images (B, C, H, W) to logits (B, classes)


class ExportFacts(Struct, frozen=True, kw_only=True):
    """What was exported, and how far its logits are from the original's."""

    file: str
    format: str
    bytes: int
    checkpoint: str
    input: str
    output: str
    images_tried: int
    largest_difference: float  # of logits, as a fraction of the largest logit


class NetworkFacts(Struct, frozen=True, kw_only=True):
    """Settings and data facts from which a network in a safetensors file is rebuilt."""

    settings: Mapping[str, object]
    data: DataFacts


def export(
    checkpoint: Path,
    kind: ExportFormat,
    path: Path,
    data_dir: Path | None,
    world: World,
    views: int | None = None,
    code: Sequence[str] = (),
    test_fraction: float | None = None,
) -> ExportFacts:
    """Export a network to `path`, which appears only if its logits match the original's.

    Args:
        checkpoint: a checkpoint file, or a run directory for its best checkpoint.
        data_dir: folder of idx files whose test images are used for the check; None for the training data's folder.
        views: number of views of each image whose predictions the network averages (TTA); None for the run's setting.
        code: the user's own network, as for `load_models`.
        test_fraction: as for `open_split`.

    Raises:
        UserError: a file cannot be read or written, a library is missing, or the exported network's logits differ.
    """
    [model] = models = load_models([checkpoint], world, views, code)
    test, class_names, *_ = open_split(models, Split.TEST, data_dir, test_fraction)
    scratch = path.with_name(f".{path.name}.unchecked")
    try:
        with _quiet():
            KINDS[kind].write(model, test, {CLASS_NAMES: to_json(class_names), CHECKPOINT: model.sha256}, scratch)
            difference = _largest_difference(model.network, KINDS[kind].load(scratch, model), test, path)
        scratch.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    except UserError:
        raise
    except Exception as error:  # torch's and onnx's compilers do not support every operation
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        first = next(iter(str(cause).strip().splitlines()), "")
        others = ", ".join(other for other in ExportFormat if other != kind)
        raise UserError(
            f"{path}: this network cannot be exported as {kind} ({type(cause).__name__}: {short(first, 300)}); try "
            f"--format {others}"
        ) from None
    finally:
        scratch.unlink(missing_ok=True)
    return ExportFacts(
        file=str(path), format=kind, bytes=path.stat().st_size, checkpoint=str(model.path),
        input=f"images (batch, {', '.join(map(str, test.image_shape))}) {_dtype(test)}",
        output=f"logits (batch, {model.info.data.num_classes}) float32",
        images_tried=sum(min(size, len(test)) for size in BATCHES), largest_difference=difference,
    )  # fmt: skip


def _largest_difference(network: Classifier, predict: Predict, test: IdxDataset, path: Path) -> float:
    """Return the largest difference between both networks' logits, as a fraction of the largest logit."""
    largest = 0.0
    for size in BATCHES:
        ids = np.linspace(0, len(test) - 1, min(size, len(test))).astype(np.int64)
        images = np.ascontiguousarray(test.__getitems__(ids).images.transpose(0, 3, 1, 2))
        with torch.inference_mode():
            expected = network(torch.from_numpy(images)).numpy()
        found = predict(images)
        if found.shape != expected.shape or not np.isfinite(found).all():
            raise UserError(
                f"{path}: was not written: for {size} images the exported network returns {found.shape}, not finite "
                f"logits of {expected.shape}; try another --format, or other versions of its libraries"
            )
        largest = max(largest, float(np.abs(found - expected).max() / np.abs(expected).max()))
        if largest > TOLERANCE or (found.argmax(1) != expected.argmax(1)).any():
            raise UserError(
                f"{path}: was not written: the exported network's logits differ from the checkpoint's by {largest:.1e} "
                f"of the largest, more than {TOLERANCE:.0e}; try another --format, or other versions of its libraries"
            )
    return largest


def _example(test: IdxDataset) -> torch.Tensor:
    return torch.from_numpy(test.__getitems__([0, 0]).images.transpose(0, 3, 1, 2).copy())


def _dtype(test: IdxDataset) -> str:
    return test.images.dtype.newbyteorder("=").name


def _write_safetensors(model: TrainedModel, test: IdxDataset, metadata: Mapping[str, str], path: Path) -> None:
    """Write weights and pixel statistics; settings, shape and classes as JSON in the header's `dist_mnist`."""
    facts = to_json(NetworkFacts(settings=model.config.to_json(), data=model.info.data))
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.network.state_dict().items()}
    path.write_bytes(safetensors.torch.save(tensors, {"format": "pt", "dist_mnist": facts, **metadata}))


def load_network(path: Path, code: Sequence[str] = ()) -> Classifier:
    """Load the network in a safetensors file that `export` wrote, in eval mode on the CPU.

    Args:
        code: the user's own network, as for `load_models`.

    Raises:
        UserError: the file is not such an export, or the code of the user's own network is not given.
    """
    try:
        metadata, tensors = read_safetensors(path)
        facts = parse(metadata["dist_mnist"], NetworkFacts)
        config = with_code_given(from_json(facts.settings, path), path, code)
        network = build_model(config, facts.data.image_shape, facts.data.num_classes)
        network.load_state_dict(tensors)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: this is not a network exported as safetensors ({error})") from None
    return network.eval()


def _load_safetensors(path: Path, model: TrainedModel) -> Predict:
    network = load_network(path, [model.config.model])
    return torch.inference_mode()(lambda images: network(torch.from_numpy(images)).numpy())


def _write_torch_export(model: TrainedModel, test: IdxDataset, metadata: Mapping[str, str], path: Path) -> None:
    with path.open("wb") as file:
        program = torch.export.export(model.network, (_example(test),), dynamic_shapes=(ANY_BATCH,))
        torch.export.save(program, file, extra_files=dict(metadata))


def _load_torch_export(path: Path, _: TrainedModel) -> Predict:
    with path.open("rb") as file:
        network = torch.export.load(file).module()
    return torch.inference_mode()(lambda images: network(torch.from_numpy(images)).numpy())


def _write_onnx(model: TrainedModel, test: IdxDataset, metadata: Mapping[str, str], path: Path) -> None:
    for name in ("onnx", "onnxscript"):
        _needed(name)
    program = torch.onnx.export(
        model.network, (_example(test),), input_names=["images"], output_names=["logits"], dynamo=True,
        dynamic_shapes=(ANY_BATCH,), verbose=False,
    )  # fmt: skip
    assert program
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def _load_onnx(path: Path, _: TrainedModel) -> Predict:
    session = _needed("onnxruntime").InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def _needed(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"--format onnx needs {name}: pip install 'dist-mnist[onnx]'") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' warnings, stderr and log lines."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


class Kind(NamedTuple):
    """An export format: the suffix of its files, and the functions that write and load a network."""

    suffix: str
    write: Callable[[TrainedModel, IdxDataset, Mapping[str, str], Path], None]
    load: Callable[[Path, TrainedModel], Predict]


KINDS = {
    ExportFormat.SAFETENSORS: Kind(".safetensors", _write_safetensors, _load_safetensors),
    ExportFormat.ONNX: Kind(".onnx", _write_onnx, _load_onnx),
    ExportFormat.TORCH_EXPORT: Kind(".pt2", _write_torch_export, _load_torch_export),
}
