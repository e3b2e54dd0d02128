"""CSV files with a row for each picture: a label column, and a column for each pixel."""

import csv
import gzip
import math
import re
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import IO, cast

import numpy as np

from dist_mnist.data.convert.choices import Split
from dist_mnist.data.convert.pictures import Unusable, Work
from dist_mnist.data.convert.readers.labels import INDEX, NUMBER, LabelTable, label_of_text
from dist_mnist.data.convert.readers.pixels import (
    ABOVE_UNIT,
    BYTES,
    UNIT,
    Arrangement,
    arrangement_of,
    choose_white,
    to_uint8,
)
from dist_mnist.data.convert.readers.source import Part, Reading, Source, batched, finished
from dist_mnist.data.idx import is_gzip
from dist_mnist.data.sources.classes import read_class_names
from dist_mnist.utils.errors import UserError, short

LABEL_NAMES = ("label", "labels", "class", "classes", "target", "targets", "y", "digit", "category")
ID_NAMES = ("", "id", "index", "imageid", "image_id", "unnamed: 0")
DELIMITERS = (",", ";", "\t")
NO_TEXT = "this is not UTF-8 text; save the table as CSV in UTF-8"
MAX_LINE = 1 << 25  # bytes
MIN_NUMBERED = 10  # columns from which on 0, 1, 2 ... are a header of column numbers, not the pixels of a picture
SNIFFED = 1000  # rows inspected to find the label column if no header names it
SCANNED = 256  # rows at a time
PIXEL = re.compile(r"[0-9]{1,4}x[0-9]{1,4}(x[0-9])?")  # row, column and channel, from 1
FRACTION = re.compile(rb"[.eEnN]")  # characters that no integer has


@dataclass(frozen=True)
class Columns:
    """How to read the rows of a file."""

    path: str
    delimiter: str
    count: int
    label: int
    pixels: tuple[int, ...]
    has_header: bool
    shape: tuple[int, ...] = ()  # of a picture, (H, W) or (H, W, C), if the header has it


@dataclass(frozen=True)
class Rows:
    """Lines of a file to read as pictures, with their line numbers."""

    columns: Columns
    arrangement: Arrangement
    white: float
    lines: tuple[bytes, ...]
    numbers: tuple[int, ...]

    def read(self) -> Iterator[np.ndarray | Unusable]:
        """Yield the pixels of each line."""
        most = ABOVE_UNIT if self.white == UNIT else self.white
        values = parse_pixels(self.columns, self.lines, self.numbers, most)
        return iter(self.arrangement.arranged(to_uint8(values, self.white, self.columns.path)))

    def name(self, index: int) -> str:
        """Return the file and line of a picture."""
        return f"{self.columns.path}, line {self.numbers[index]}"


def open_csv(files: Sequence[tuple[Split, Path]], reading: Reading) -> Source:
    """Open the pictures in CSV files. The files are read twice: for the labels, then for the pixels.

    Class names come from a classes.json next to the first file, if it exists.

    Raises:
        UserError: a file is not such a table, or a value is not a valid pixel; the message names the line.
    """
    table = LabelTable(", ".join(str(path) for _, path in files), read_class_names(files[0][1].parent), is_fixed=True)
    opened = [(split, path, _columns(path, reading.label_column)) for split, path in files]
    labels = [_labels(path, columns, table) for _, path, columns in opened]
    count = {len(columns.pixels) for _, _, columns in opened}
    if len(count) > 1:
        raise UserError(f"{table.where}: the files have different numbers of pixels, {sorted(count)}")
    arrangement, notes = arrangement_of((count.pop(),), table.where, reading, opened[0][2].shape)
    parts: dict[Split, list[Part]] = {split: [] for split in Split}
    white, of_white = reading.pixel_max, list[str]()
    if white is None:
        has_fractions = any(fractions for _, fractions in labels)
        blocks = [(str(path), _blocks(path, columns, has_fractions)) for _, path, columns in opened]
        white, of_white = choose_white(blocks, table.where)
    for (split, path, columns), (numbers, _) in zip(opened, labels, strict=True):
        parts[split].append(_part(path, columns, arrangement, white, numbers))
    where = sorted({columns.label for _, _, columns in opened})
    notes = [f"the label column is {' or '.join(map(str, where))} (from 0)", *notes, *of_white]
    return finished("CSV", table, parts, notes, white)


def _part(path: Path, columns: Columns, arrangement: Arrangement, white: float, labels: np.ndarray) -> Part:
    def work(keep: np.ndarray, size: int) -> Iterator[Work]:
        for rows in batched(compress(_lines(path, columns.has_header), keep), size):
            numbers, lines = zip(*rows, strict=True)
            yield Rows(columns, arrangement, white, lines, numbers)

    return Part(labels, work)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with cast(IO[bytes], gzip.open(path, "rb")) if is_gzip(path) else open(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip stream is damaged ({error}); get the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _lines(path: Path, has_header: bool) -> Iterator[tuple[int, bytes]]:
    """Yield the rows of a file with their line numbers from 1, without the header and empty lines."""
    with _opened(path) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise UserError(f"{path}: line {number} exceeds {MAX_LINE >> 20} MiB; is this a table of pixels?")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
            line = line.strip(b"\r\n")
            if not line.strip():
                continue
            if has_header:  # the first row, on whichever line
                has_header = False
                continue
            yield number, line


def _cells(line: bytes, delimiter: str, place: str) -> list[str]:
    try:
        [cells] = csv.reader([line.decode()], delimiter=delimiter, strict=True)
        return cells
    except UnicodeDecodeError:
        raise UserError(f"{place}: {NO_TEXT}") from None
    except (csv.Error, ValueError) as error:
        raise UserError(f"{place}: this is not a valid CSV row ({error})") from None


def _columns(path: Path, wanted: str | None) -> Columns:
    """Detect delimiter, header and columns of a file from its first rows."""
    rows: list[list[str]] = []
    delimiter = ","
    for number, line in _lines(path, has_header=False):
        if not rows:
            delimiter = max(DELIMITERS, key=lambda mark: line.count(mark.encode()))
        rows.append(_cells(line, delimiter, f"{path}, line {number}"))
        if len(rows) == SNIFFED or len(rows) * len(rows[0]) > 1 << 22:
            break
    if not rows:
        raise UserError(f"{path}: the file has no rows")
    header = [cell.strip().lower() for cell in rows[0]]
    count = len(header)
    _check_form(path, header, rows)
    has_header = _is_header(header, wanted)
    if count < 2:
        raise UserError(f"{path}: expected a label column and a column for each pixel, got a single column")
    if has_header:
        label = _named_column(path, header, wanted)
    else:
        label = _unnamed_column(path, [row for row in rows if len(row) == count], wanted)
    ids = [column for column, name in enumerate(header) if has_header and name in ID_NAMES]
    pixels = tuple(column for column in range(count) if column != label and column not in ids)
    shape = _named_shape(header[pixels[-1]], len(pixels)) if has_header and pixels else ()
    return Columns(str(path), delimiter, count, label, pixels, has_header, shape)


def _named_shape(last: str, count: int) -> tuple[int, ...]:
    """Return the picture shape from the last name if pixel columns are named 1x1, 1x2, ... or 1x1x1, ..., else ()."""
    if not PIXEL.fullmatch(last):
        return ()
    shape = tuple(map(int, last.split("x")))
    return shape if math.prod(shape) == count and (len(shape) == 2 or shape[2] in (1, 3)) else ()


def _check_form(path: Path, header: list[str], rows: list[list[str]]) -> None:
    """Raise a UserError for a header that is really a picture, and for all pixels in one cell."""
    if _is_mangled(header):
        raise UserError(
            f"{path}, line 1: {short(', '.join(header), 40)} looks like a row of numbers that pandas read as a header; "
            "save the table from pd.read_csv(..., header=None), or remove the line"
        )
    column = header.index("pixels") if "pixels" in header else len(header)
    if any(" " in cell.strip() for row in rows[1:2] for cell in row[column : column + 1]):
        raise UserError(
            f"{path}: the column 'pixels' has all pixels of a picture in one cell; use one column per pixel"
        )


def _is_mangled(cells: Sequence[str]) -> bool:
    """Whether cells are like 0, 0.1, 0.2 ..., pandas' way to make repeated column names unique."""
    seen: dict[str, int] = {}
    for cell in cells:
        value, _, number = cell.partition(".")
        if not INDEX.fullmatch(value) or (number or "0") != str(seen.get(value, 0)):
            return False
        seen[value] = seen.get(value, 0) + 1
    return len(seen) < len(cells)


def _is_header(cells: Sequence[str], wanted: str | None) -> bool:
    """Whether a table's first row has column names: words, or column numbers as pandas writes them."""
    words = [cell for cell in cells if cell and not NUMBER.fullmatch(cell)]
    numbers = [str(column) for column in range(len(cells))]
    return (
        len(words) > len(cells) / 2
        or any(word in LABEL_NAMES or word == (wanted or "").lower() for word in words)
        or (len(cells) >= MIN_NUMBERED and list(cells) in (numbers, ["", *numbers[:-1]]))
    )


def _named_column(path: Path, header: list[str], wanted: str | None) -> int:
    if wanted is not None:
        if header.count(wanted.lower()) > 1:
            raise UserError(f"{path}: several columns are named {wanted!r}; give --label-column as a number")
        if wanted.lower() in header:
            return header.index(wanted.lower())
        return _column_number(path, len(header), wanted)
    found = [column for column, name in enumerate(header) if name in LABEL_NAMES]
    if len(found) == 1:
        return found[0]
    names = short(", ".join(header))
    how = "several label columns" if found else "no label column"
    raise UserError(
        f"{path}: the header ({names}) has {how}; name one by --label-column (tables without labels, such as the test "
        "set of a contest, cannot be imported: give the files that have labels)"
    )


def _unnamed_column(path: Path, rows: list[list[str]], wanted: str | None) -> int:
    """Return the label column of a table without header: the first or the last, if the other cannot be it."""
    if wanted is not None:
        return _column_number(path, len(rows[0]), wanted)
    last = len(rows[0]) - 1
    names = [column for column in (0, last) if any(not NUMBER.fullmatch(row[column].strip()) for row in rows)]
    varying = [column for column in (0, last) if len({row[column] for row in rows}) > 1]
    for candidates in (names, varying):
        if len(candidates) == 1:
            return candidates[0]
    raise UserError(
        f"{path}: there is no header, and the labels could be in the first or the last column; give --label-column "
        "first or --label-column last"
    )


def _column_number(path: Path, count: int, wanted: str) -> int:
    places = {"first": 0, "last": count - 1}
    if wanted in places:
        return places[wanted]
    if wanted.isdecimal() and int(wanted) < count:
        return int(wanted)
    raise UserError(
        f"{path}: there is no column {short(wanted)!r} among its {count} columns; --label-column expects a name in the "
        "header, first, last, or a number from 0"
    )


def _labels(path: Path, columns: Columns, table: LabelTable) -> tuple[np.ndarray, bool]:
    """Return the label number of each row, (N,) int32, and whether a pixel may be a fraction."""
    found = array("i")
    has_fractions = False
    for number, line in _lines(path, columns.has_header):
        place = f"{path}, line {number}"
        cells = _cells_of(line, columns, place)
        found.append(table.number(label_of_text(cells.pop(columns.label), place), place))
        if not has_fractions and FRACTION.search(line):
            has_fractions = any(FRACTION.search(cell.encode()) for cell in cells)
    return np.array(found, np.int32), has_fractions


def _cells_of(line: bytes, columns: Columns, place: str) -> list[str]:
    """Return the cells of a row; str.split, for rows without quotes, is faster than the csv module."""
    try:
        mark = columns.delimiter
        cells = _cells(line, mark, place) if b'"' in line else line.decode().split(mark)
    except UnicodeDecodeError:
        raise UserError(f"{place}: {NO_TEXT}") from None
    if len(cells) != columns.count:
        raise UserError(f"{place}: expected {columns.count} columns as in the first row, got {len(cells)}")
    return cells


def _blocks(path: Path, columns: Columns, has_fractions: bool) -> Iterator[np.ndarray]:
    """Yield the pixels of a file until their scale is clear: for integers, until one is above 1."""
    for rows in batched(_lines(path, columns.has_header), SCANNED):
        numbers, lines = zip(*rows, strict=True)
        yield (block := parse_pixels(columns, lines, numbers, np.inf if has_fractions else BYTES))
        if not has_fractions and block.max(initial=0) > 1:
            return


def parse_pixels(columns: Columns, lines: Sequence[bytes], numbers: Sequence[int], most: float) -> np.ndarray:
    """Parse the pixels (n, pixels) float64 of lines that all have the same number of columns.

    Raises:
        UserError: a cell is not a number, negative, or above `most`.
    """
    texts = [line.decode("utf-8", "replace") for line in lines]
    try:
        values = np.loadtxt(
            texts, delimiter=columns.delimiter, usecols=columns.pixels, quotechar='"', ndmin=2, comments=None
        )
    except ValueError:
        raise UserError(_wrong_cell(columns, texts, numbers)) from None
    if len(wrong := np.argwhere(~((values >= 0) & (values <= most) & (values < np.inf)))):
        row, column = wrong[0]
        raise UserError(
            f"{columns.path}, line {numbers[row]}: the pixel in column {columns.pixels[column]} (from 0) is "
            f"{values[row, column]:g}, expected 0 to {'255, or 0 to 1' if most in (BYTES, np.inf) else f'{most:g}'}"
        )
    return values


def _wrong_cell(columns: Columns, texts: Sequence[str], numbers: Sequence[int]) -> str:
    for text, number in zip(texts, numbers, strict=True):
        cells = _cells(text.encode(), columns.delimiter, f"{columns.path}, line {number}")
        for column in columns.pixels:
            try:
                float(cells[column])
            except ValueError:
                return (
                    f"{columns.path}, line {number}: column {column} (from 0) has {short(cells[column])!r}, which is "
                    "not a pixel value"
                )
    return f"{columns.path}, lines {numbers[0]} to {numbers[-1]}: expected rows of numbers"
