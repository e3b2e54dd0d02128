"""Parquet files of Hugging Face image datasets: a column with the bytes of picture files, and a label column."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dist_mnist.data.convert.choices import Split
from dist_mnist.data.convert.pictures import Unusable, Work, picture_pixels
from dist_mnist.data.convert.readers.labels import LabelTable
from dist_mnist.data.convert.readers.source import Part, Reading, Source, finished
from dist_mnist.data.sources.classes import read_class_names
from dist_mnist.utils.errors import UserError, short

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "y", "digit", "character")
MAX_GROUP = 1 << 31  # bytes in a row group, which is read at once
BATCH = 256  # rows
MAX_METADATA = 1 << 24


class Columns(NamedTuple):
    """The columns of pictures and labels, and the class names if the file has them."""

    image: str
    label: str
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class Encoded:
    """Encoded pictures in rows of a table."""

    path: str
    contents: tuple[bytes | None, ...]
    rows: tuple[int, ...]
    white: float | None

    def read(self) -> Iterator[np.ndarray | Unusable]:
        """Yield the pixels of each picture."""
        for index, content in enumerate(self.contents):
            if content is None:
                yield Unusable(f"{self.name(index)}: the row has no picture bytes")
            else:
                yield picture_pixels(content, self.name(index), self.white)

    def name(self, index: int) -> str:
        """Return the file and row of a picture."""
        return f"{self.path}, row {self.rows[index]}"


def open_parquet(files: Sequence[tuple[Split, Path]], reading: Reading) -> Source:
    """Open the pictures in parquet files; the files of a split are concatenated.

    Class names come from a classes.json next to the first file, else from the metadata.

    Raises:
        UserError: a file is damaged, or lacks pictures or labels, or pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError("reading parquet files needs pyarrow: pip install 'dist-mnist[data]'") from None
    where = str(files[0][1]) if len(files) == 1 else str(files[0][1].parent)
    columns: Columns | None = None
    table: LabelTable | None = None
    parts: dict[Split, list[Part]] = {split: [] for split in Split}
    for split, path in files:
        found = _columns(path, reading.label_column)
        if columns is None or table is None:
            in_file = read_class_names(path.parent)
            columns, table = found, LabelTable(where, in_file or found.names, is_fixed=in_file is not None)
        elif found != columns:
            raise UserError(f"{path}: its columns {found} differ from {columns} in {files[0][1]}")
        parts[split].append(_part(path, columns, table, reading.pixel_max))
    assert table is not None and columns is not None
    return finished("parquet", table, parts, [f"the label column is {columns.label}"])


@contextmanager
def _opened(path: Path) -> Iterator["parquet.ParquetFile"]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        said = short(str(error).strip(), 120)
        raise UserError(f"{path} is not a parquet file, or is damaged ({said})") from None


def _columns(path: Path, wanted: str | None) -> Columns:
    with _opened(path) as file:
        for number in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(number).total_byte_size
            if size > MAX_GROUP:
                raise UserError(
                    f"{path}: a row group, which is read at once, has {size:,} bytes; write the file with row groups "
                    f"of at most {MAX_GROUP:,}"
                )
        schema = file.schema_arrow
    listing = short(", ".join(f"{field.name}: {field.type}" for field in schema), 300)
    if len(set(schema.names)) < len(schema.names):
        raise UserError(f"{path}: two of its columns have the same name; its columns are {listing}")
    names_of = _class_labels(schema, path)
    images = [field.name for field in schema if _is_image(field.type)]
    if len(images) != 1:
        raise UserError(
            f"{path}: expected one picture column (a struct with the bytes of a picture file), got {len(images)}; its "
            f"columns are {listing}"
        )
    label = wanted or _label_column(schema, names_of, path, listing)
    if label not in schema.names:
        raise UserError(f"{path}: there is no column {label!r}; its columns are {listing}")
    kind = schema.field(label).type
    if not _is_label(kind):
        raise UserError(f"{path}: the label column {label} has {kind}, expected integers or strings (--label-column)")
    return Columns(images[0], label, names_of.get(label) if _is_integer(kind) else None)


def _label_column(schema: "pa.Schema", names_of: dict[str, tuple[str, ...]], path: Path, listing: str) -> str:
    for candidates in (
        [name for name in names_of if name in schema.names],
        [name for name in schema.names if name.lower() in LABEL_NAMES],
    ):
        if len(candidates) == 1:
            return candidates[0]
        if usual := [name for name in LABEL_NAMES if name in candidates]:
            return usual[0]
    raise UserError(f"{path}: the label column is unclear; name it by --label-column; its columns are {listing}")


def _is_image(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_integer(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind))


def _is_label(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind))


def _class_labels(schema: "pa.Schema", path: Path) -> dict[str, tuple[str, ...]]:
    """Return the class names of each column, from Hugging Face's metadata in the file."""
    content = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(content[:MAX_METADATA]).get("info", {}).get("features", {})
        return {
            str(column): tuple(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{path}: its Hugging Face metadata is damaged; write the file again") from None


def _part(path: Path, columns: Columns, table: LabelTable, white: float | None) -> Part:
    labels = []
    with _opened(path) as file:
        for batch in file.iter_batches(1 << 16, columns=[columns.label]):
            column = batch.column(columns.label)  # selecting `a` also reads `a.b`, which might be a field of it
            if column.null_count:
                raise UserError(f"{path}: {column.null_count} rows lack a label in the column {columns.label}")
            values = np.array(column.to_pylist())
            labels.append(table.numbers(values, f"{path}, column {columns.label}"))

    def work(keep: np.ndarray, size: int) -> Iterator[Work]:
        with _opened(path) as file:
            start = 0
            for batch in file.iter_batches(min(size, BATCH), columns=[columns.image]):
                chosen = np.flatnonzero(keep[start : start + len(batch)])
                column = batch.column(columns.image)
                found = [column[row].as_py() for row in chosen.tolist()]
                contents = tuple(value.get("bytes") if isinstance(value, dict) else value for value in found)
                yield Encoded(str(path), contents, tuple((start + chosen).tolist()), white)
                start += len(batch)

    return Part(np.concatenate([np.empty(0, np.int32), *labels]), work)
