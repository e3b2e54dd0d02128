"""Sources that are damaged, hostile or simply not what they should be: a sentence each, and nothing is left behind."""

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_mnist.data.convert.importing import import_pictures
from dist_mnist.data.convert.plan import ImportOptions
from dist_mnist.utils.errors import UserError
from helpers.data import (
    encoded,
    some_colours,
    some_digits,
    write_cifar,
    write_csv,
    write_npz,
    write_parquet,
    write_pictures,
)
from helpers.runs import dist_mnist

DATA = some_digits(30, 20)
IMAGES, LABELS = DATA.train_images, DATA.train_labels
PARTS = ("--test-fraction=0.2",)


def pictures(change: Callable[[Path], object], images: np.ndarray = IMAGES) -> Callable[[Path], Path]:
    """A folder of pictures, changed; gives what makes it."""

    def make(folder: Path) -> Path:
        write_pictures(folder / "set", images, [f"class {label}" for label in LABELS])
        change(folder / "set")
        return folder / "set"

    return make


def put(name: str, content: bytes) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return write


def only(name: str, content: bytes | str) -> Callable[[Path], Path]:
    """A single file."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def png(width: int, height: int, body: bytes = b"\0" * 1000) -> bytes:
    """A PNG that declares a size, whatever is in it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def animation() -> bytes:
    frames = [Image.fromarray(image) for image in IMAGES[:3]]
    frames[0].save(file := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def pages() -> bytes:
    frames = [Image.fromarray(image) for image in IMAGES[:3]]
    frames[0].save(file := io.BytesIO(), "TIFF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def table(change: Callable[[list[str]], object], **options: bool) -> Callable[[Path], Path]:
    """A CSV file whose lines are changed."""

    def make(folder: Path) -> Path:
        path = write_csv(folder / "a.csv", IMAGES, LABELS.tolist(), **options)
        lines = path.read_text().splitlines()
        change(lines)
        path.write_text("\n".join(lines) + "\n")
        return path

    return make


def cell(line: int, column: int, value: str) -> Callable[[list[str]], object]:
    def change(lines: list[str]) -> None:
        cells = lines[line].split(",")
        cells[column] = value
        lines[line] = ",".join(cells)

    return change


def arrays(**named: object) -> Callable[[Path], Path]:
    """An npz archive."""

    def make(folder: Path) -> Path:
        np.savez_compressed(folder / "a.npz", **named)
        return folder / "a.npz"

    return make


def archive(members: dict[str, bytes], change: Callable[[bytes], bytes] = bytes) -> Callable[[Path], Path]:
    """A zip file under the name of an npz archive."""

    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members.items():
                file.writestr(name, content)
        (folder / "a.npz").write_bytes(change((folder / "a.npz").read_bytes()))
        return folder / "a.npz"

    return make


def npy(array: np.ndarray) -> bytes:
    np.save(file := io.BytesIO(), array, allow_pickle=True)
    return file.getvalue()


def npy_header(shape: str, descr: str = "'|u1'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def bomb(folder: Path) -> Path:
    """An archive whose directory says that an array of 5 GB is in a few kilobytes."""
    path = archive({"x_train.npy": npy(IMAGES), "y_train.npy": npy(LABELS)})(folder)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 4_000_000_000)
    path.write_bytes(bytes(content))
    return path


def damaged_lzma(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("x.npy", npy(IMAGES))
        file.writestr("y.npy", npy(LABELS))
    content = bytearray((folder / "a.npz").read_bytes())
    content[100:700:3] = bytes(200)
    (folder / "a.npz").write_bytes(content)
    return folder / "a.npz"


def shard(change: Callable[..., object], name: str = "a.parquet") -> Callable[[Path], Path]:
    """A parquet file of what `change` makes of pyarrow."""

    def make(folder: Path) -> Path:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table(change(pa)), folder / name)
        return folder / name

    return make


def twins(folder: Path) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    columns = [pa.array([b"x"] * 4), pa.array([0, 1, 0, 1]), pa.array([0, 0, 1, 1])]
    parquet.write_table(pa.Table.from_arrays(columns, ["image", "label", "label"]), folder / "a.parquet")
    return folder / "a.parquet"


def hf(labels: list[object], names: list[str] | None = None, cut: int | None = None) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = write_parquet(folder / "a.parquet", IMAGES[: len(labels)], labels, names)
        path.write_bytes(path.read_bytes()[:cut])
        return path

    return make


def loop(folder: Path) -> None:
    (folder / "class 1" / "again").symlink_to(folder)


def maze(folder: Path) -> None:
    """Forty folders, each of which leads to the next by two ways: a million million paths."""
    for number in range(40):
        (folder / "class 1" / str(number)).mkdir()
        for name in ("left", "right"):
            (folder / "class 1" / str(number) / name).symlink_to(folder / "class 1" / str(number + 1))


def not_utf8(folder: Path) -> None:
    path = os.path.join(os.fsencode(folder), b"caf\xe9")
    os.mkdir(path)
    with open(os.path.join(path, b"1.png"), "wb") as file:
        file.write(encoded(IMAGES[0]))


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def deep(folder: Path) -> None:
    path = folder / "class 1" / "/".join("a" * 80)
    path.mkdir(parents=True)


def many_folders(folder: Path) -> Path:
    for number in range(4100):
        (folder / "set" / str(number)).mkdir(parents=True)
    return folder / "set"


def cifar(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_cifar(folder / "set", some_colours(20, 10), [f"c{number}" for number in range(10)])
        change(folder / "set")
        return folder / "set"

    return make


def idx_folder(**files: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name, content in files.items():
            put(name, content)(folder / "set")
        return folder / "set"

    return make


MANY = [f"{kind}/{number}" for kind in "ab" for number in range(10)]
GOOD_IDX = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 2]) + bytes(range(8))
OBJECTS = np.array([{"a": 1}, None], object)
ONES = np.ones((4, 5, 5), np.uint8)
TWO = np.array([0, 1, 0, 1])
PICKLE = pickle.dumps({"data": [1, 2], "labels": [0, 1]})

HOSTILE: dict[str, tuple[Callable[[Path], Path], str, tuple[str, ...]]] = {
    # folders of pictures
    "nothing there": (lambda folder: folder / "none", "cannot be read (No such file or directory)", PARTS),
    "a pipe": (pipe, "neither a folder nor a file", PARTS),
    "an empty folder": (lambda folder: folder, "contains nothing; a source is one of", PARTS),
    "only empty folders": (lambda f: [(f / "set" / n).mkdir(parents=True) for n in "ab"] and f / "set",
                           "no pictures found", PARTS),
    "only text": (lambda f: [put(f"set/{n}.txt", b"hello")(f) for n in MANY] and f / "set",
                  "no pictures found", PARTS),
    "an empty class, and no test part": (
        pictures(lambda f: (f / "class x").mkdir()), "1 of 9 classes have no training pictures", ()),
    "an empty class": (pictures(lambda f: (f / "class x").mkdir()), "1 of 9 classes have no training pictures", PARTS),
    "no picture at all": (lambda f: [put(f"set/{n}.dat", b"hello")(f) for n in MANY] and f / "set",
                          "none of the first 20 files is a usable picture", PARTS),
    "one class": (lambda f: write_pictures(f / "set", IMAGES, ["x"] * 30), "there is only one class, 'x'", PARTS),
    "one picture": (only("a.png", encoded(IMAGES[0])), "is a single picture; give the folder", PARTS),
    "pictures without classes": (
        lambda f: put("set/a.png", encoded(IMAGES[0]))(f) or f / "set", "contains a.png", PARTS),
    "a picture beside the classes": (
        pictures(put("a.png", encoded(IMAGES[0]))), "a.png is not in a class folder", PARTS),
    "only a test part": (lambda f: write_pictures(f / "set" / "test", IMAGES, LABELS) and f / "set",
                         "no training split, only test", ()),
    "no test part": (pictures(lambda f: None), "no test split: --test-fraction", ()),
    "a class of the test part alone": (
        lambda f: [write_pictures(f / "set" / p, IMAGES, [f"c{n % 5 + (p == 'test')}" for n in range(30)])
                   for p in ("train", "test")] and f / "set", "classes have no training pictures: c5", ()),
    "two training parts": (lambda f: [write_pictures(f / "set" / p, IMAGES, LABELS) for p in ("train", "training")]
                           and f / "set", "both train and training could be the train split", ()),
    "a folder that links to itself": (pictures(loop), "leads to a folder that is already part", PARTS),
    "a maze of links": (pictures(maze), "leads to a folder that is already part", PARTS),
    "folders too deep": (pictures(deep), "more than 64 levels deep", PARTS),
    "a name that is not UTF-8": (pictures(not_utf8), "is not UTF-8; rename it", PARTS),
    "a name with a control character": (
        pictures(put("a\x1b[31m/1.png", encoded(IMAGES[0]))), "is empty or unprintable", PARTS),
    "classes that differ in case": (pictures(put("CLASS 1/1.png", encoded(IMAGES[0]))), "differ only in case", PARTS),
    "classes that differ in encoding": (
        pictures(lambda f: [put(f"{n}/1.png", encoded(IMAGES[0]))(f) for n in ("caf\u00e9", "cafe\u0301")]),
        "differ only in case or Unicode encoding", PARTS),
    "letters that differ in encoding": (
        pictures(lambda f: [put(f"{n}/1.png", encoded(IMAGES[0]))(f) for n in ("\u00e9", "e\u0301")]),
        "differ only in case or Unicode encoding", PARTS),
    "a file's name of two lines": (pictures(put("class 1/a\nb.png", b"")), r"class 1/a\nb.png: the file is not", PARTS),
    "more than 4096 classes": (many_folders, "more than 4096 distinct labels", PARTS),
    "gray and coloured at once": (pictures(lambda f: None), "contradict each other", (*PARTS, "--gray", "--color")),
    "folders with a column of labels": (
        pictures(lambda f: None), "--label-column x does not apply to ", (*PARTS, "--label-column=x")),
    "folders with a layout": (pictures(lambda f: None), "--layout hwc does not apply to ", (*PARTS, "--layout=hwc")),
    "a decompression bomb": (
        pictures(put("class 1/a.png", png(60_000, 60_000))), "a.png: the picture exceeds", PARTS),
    "a large picture": (pictures(put("class 1/a.png", png(9_000, 9_000))), "9000 x 9000 pixels exceed", PARTS),
    "a large picture that comes first": (
        pictures(put("class 0/0.png", png(10_000, 10_000))), "10000 x 10000 pixels exceed", PARTS),
    "a picture without pixels": (pictures(put("class 1/a.png", png(0, 4))), "a.png", PARTS),
    "large pictures without --size": (
        lambda f: [put(f"set/{n}.png", encoded(np.zeros((2000, 3), np.uint8)))(f) for n in MANY] and f / "set",
        "images have at most 1024 x 1024: scale", PARTS),
    "a cut-off picture": (pictures(put("class 1/a.png", encoded(IMAGES[0])[:200])), "the picture is damaged", PARTS),
    "an empty file": (pictures(put("class 1/a.png", b"")), "a.png: the file is not a picture", PARTS),
    "an animation": (pictures(put("class 1/a.gif", animation())), "several frames or pages", PARTS),
    "a document of several pages": (pictures(put("class 1/a.tif", pages())), "several frames or pages", PARTS),
    "a program for a printer": (
        pictures(put("class 1/a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\nshowpage\n")),
        "a.eps: the file is not a picture", PARTS),
    "a broken link": (pictures(lambda f: (f / "class 1/a.png").symlink_to("nowhere")), "a broken link", PARTS),
    "a pipe among pictures": (pictures(lambda f: os.mkfifo(f / "class 1/a.png")), "not a regular file", PARTS),
    "floating-point pixels": (
        pictures(lambda f: Image.fromarray(IMAGES[0].astype(np.float32)).save(f / "class 1/a.tif")),
        "floating-point pixels", PARTS),
    "an unknown class": (
        pictures(lambda f: None), "--classes: unknown class 'class 99'", (*PARTS, "--classes=class 1,class 99")),
    "a class twice": (pictures(lambda f: None), "names 'class 1' twice", (*PARTS, "--classes=class 1,class 1")),
    "classes on two lines": (pictures(lambda f: None), "--classes expects", (*PARTS, "--classes=class 1\nclass 2")),
    "no classes": (pictures(lambda f: None), "there is only one class", (*PARTS, "--classes=")),
    "a size that is none": (pictures(lambda f: None), "--size expects HEIGHTxWIDTH", (*PARTS, "--size=28")),
    "a size without pixels": (pictures(lambda f: None), "--size expects HEIGHTxWIDTH", (*PARTS, "--size=0x28")),
    "a huge size": (pictures(lambda f: None), "--size 9999x9999: images have at most", (*PARTS, "--size=9999x9999")),
    "a fraction of nothing": (pictures(lambda f: None), "--test-fraction 1e-09", ("--test-fraction=1e-9",)),
    "a limit below the classes": (pictures(lambda f: None), "--limit 3 is less than", (*PARTS, "--limit=3")),
    "a test part and a fraction": (lambda f: write_npz(f / "a.npz", DATA), "the source has a test split", PARTS),
    # other files
    "an archive": (only("a.zip", b"PK\3\4"), "unpack this archive first", PARTS),
    "a program": (only("a.exe", b"MZ"), "cannot be imported", PARTS),
    "CIFAR's pickled version": (lambda f: put("set/data_batch_1", PICKLE)(f) or f / "set",
                                "never loaded; use CIFAR's binary version", PARTS),
    "a pickle": (only("a.pkl", PICKLE), "never loaded", PARTS),
    "several kinds": (lambda f: [put("set/a.npz", b"")(f), put("set/a.parquet", b"")(f)] and f / "set",
                      "files of different kinds", PARTS),
    # CSV
    "a CSV without rows": (only("a.csv", ""), "the file has no rows", PARTS),
    "a CSV whose first picture became a header": (
        only("a.csv", "5,0,0.1,0.2,7\n1,2,3,4,5\n"), "looks like a row of numbers", PARTS),
    "a CSV with all pixels in a cell": (
        only("fer2013.csv", "emotion,pixels,Usage\n0,1 2 3 4,Training\n"), "pixels of a picture in one cell", PARTS),
    "a CSV with the label -1": (table(cell(3, 0, "-1")), "line 4: the label -1 means unlabelled", PARTS),
    "a CSV of a header": (only("a.csv", "label,pixel0\n"), "no pictures found", PARTS),
    "a CSV of one column": (only("a.csv", "label\n1\n2\n"), "got a single column", PARTS),
    "a CSV with a million columns": (only("a.csv", ",".join(["0"] * 10**6) + "\n" + ",".join(["1"] * 10**6) + "\n"),
                                     "999999 values per picture are not a square", (*PARTS, "--label-column=first")),
    "a CSV with a cell beyond all": (only("a.csv", "label,a\n1," + "9" * 200_000 + "\n"), "line 2", PARTS),
    "a CSV with a line of 40 MB": (only("a.csv", "label," + "0" * 40_000_000), "line 1 exceeds 32 MiB", PARTS),
    "a CSV with pixels that are not numbers": (
        table(cell(3, 5, "nan")), "line 4: the pixel in column 5 (from 0) is nan", PARTS),
    "a CSV with endless pixels": (table(cell(3, 5, "inf")), "line 4: the pixel in column 5 (from 0) is inf", PARTS),
    "a CSV with negative pixels": (table(cell(3, 5, "-7")), "line 4: the pixel in column 5 (from 0) is -7", PARTS),
    "a CSV with bright pixels": (table(cell(3, 5, "256")), "line 4: the pixel in column 5 (from 0) is 256", PARTS),
    "a CSV with words for pixels": (table(cell(3, 5, "cat")), "line 4: column 5 (from 0) has 'cat'", PARTS),
    "a CSV with empty pixels": (table(cell(3, 5, "")), "line 4: column 5 (from 0) has ''", PARTS),
    "a CSV with labels that are fractions": (
        table(cell(3, 0, "0.5")), "line 4: the label 0.5 is not an integer", PARTS),
    "a CSV with a missing label": (table(cell(3, 0, "")), "line 4: the label is missing", PARTS),
    "a CSV with short rows": (table(lambda lines: lines.__setitem__(7, "1,2,3")), "the first row, got 3", PARTS),
    "a CSV with long rows": (table(lambda lines: lines.__setitem__(7, lines[7] + ",1")), "first row, got 786", PARTS),
    "a CSV with an open quotation": (table(cell(3, 0, '"1')), "line 4: this is not a valid CSV row", PARTS),
    "a CSV that is not UTF-8": (only("a.csv", b"label,a,b\ncaf\xe9,1,2\n"), "line 2: this is not UTF-8 text", PARTS),
    "a CSV of zero bytes": (only("a.csv", b"label,a\n\0\0\0,1\n"), "line 2", PARTS),
    "a CSV without labels": (only("a.csv", "pixel0,pixel1,pixel2\n1,2,3\n"), "has no label column", PARTS),
    "a CSV without header whose label may be either": (
        only("a.csv", "1,2,3,4,0\n0,5,5,3,1\n2,1,1,7,1\n"), "--label-column first or --label-column last", PARTS),
    "a CSV with that column twice": (
        only("a.csv", "kind,kind,a\n0,1,2\n"), "several columns are named 'kind'", (*PARTS, "--label-column=kind")),
    "a CSV that begins with an empty pixel": (
        only("a.csv", "0,1,,3,4\n" + "1,1,2,3,4\n" * 9), "line 1: column 2 (from 0) has ''",
        (*PARTS, "--label-column=first")),
    "a CSV without that column": (table(lambda lines: None), "no column 'species'", (*PARTS, "--label-column=species")),
    "a CSV in a damaged gzip": (
        only("a.csv.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\3abc"), "the gzip stream is damaged", PARTS),
    # arrays
    "a zip bomb": (bomb, "a zip bomb", PARTS),
    "an npz that is no archive": (only("a.npz", b"hello"), "is not an npz archive, or is damaged", PARTS),
    "an npz that is cut off": (archive({"x.npy": npy(ONES)}, lambda c: c[: len(c) // 2]), "not an npz archive", PARTS),
    "an npz with a wrong checksum": (
        archive({"x.npy": npy(ONES),
        "y.npy": npy(TWO)}, lambda c: c[:14] + b"\0\0\0\0" + c[18:].replace(c[14:18], b"\0\0\0\0")),
        "is not an npz archive, or is damaged", PARTS),
    "an npz whose packing is damaged": (damaged_lzma, "is not an npz archive, or is damaged", PARTS),
    "an npz without arrays": (archive({"readme.txt": b"hello"}), "the archive has no arrays", PARTS),
    "an npz of objects": (arrays(x_train=ONES, y_train=OBJECTS), "Python objects (a pickle)", PARTS),
    "an npz with a pickle": (
        archive({"x_train.npy": PICKLE, "y_train.npy": npy(TWO)}), "Python objects (a pickle)", PARTS),
    "an npz with a name of a path": (archive({"../x_train.npy": npy(ONES)}), "images lack labels", PARTS),
    "an npz with huge dimensions": (archive({"x.npy": npy_header("(99999999999, 28, 28)"), "y.npy": npy(TWO)}),
                                    "the array is damaged", PARTS),
    "an npz with dimensions beyond all": (archive({"x.npy": npy_header("(2**99, 28, 28)"), "y.npy": npy(TWO)}),
                                          "the array is damaged", PARTS),
    "an npz with dimensions that overflow": (archive({"x.npy": npy_header(f"({2**62}, {2**62})"), "y.npy": npy(TWO)}),
                                             "the array is damaged", PARTS),
    "an npz with negative dimensions": (
        archive({"x.npy": npy_header("(-4, 5, 5)"), "y.npy": npy(TWO)}), "a.npz[x]", PARTS),
    "an npz with dimensions beyond all, of nothing": (
        archive({"x.npy": npy_header(f"(0, {2**40}, {2**40})"), "y.npy": npy(TWO)}), "which no array can have", PARTS),
    "an npz with a great many of nothing": (
        archive({"x.npy": npy_header(f"({2**40}, 28, 28)", "'|S0'"), "y.npy": npy(TWO)}), "no array can have", PARTS),
    "an npz with too many dimensions": (
        archive({"x.npy": npy_header(f"({'1, ' * 90})") + b"\0", "y.npy": npy(TWO)}), "no array can have", PARTS),
    "an npz with a truth for a dimension": (
        archive({"x.npy": npy_header("(True, 5, 5)") + bytes(25), "y.npy": npy(TWO)}), "no array can have", PARTS),
    "an npz with code for a header": (archive({"x.npy": npy_header("(1,)", "__import__('os').abort()")}),
                                      "the array is damaged", PARTS),
    "an npz of other names": (arrays(std=np.ones((3, 3))), "expected arrays such as x_train", PARTS),
    "an npz without labels": (arrays(x_train=ONES), "train images lack labels; the arrays are", PARTS),
    "an npz of two images": (arrays(x=ONES, images=ONES, y=TWO), "could be the train images; give the files", PARTS),
    "a number for pictures": (arrays(x=np.array(5), y=TWO), "a.npz[x]: expected pictures", PARTS),
    "fewer labels than images": (arrays(x=ONES, y=TWO[:3]), "3 labels but ", PARTS),
    "images whose number is the last axis": (
        arrays(X=np.ones((5, 5, 3, 8)), y=[0, 1] * 4), "is the last one: save np.moveaxis", PARTS),
    "several labels for a picture": (arrays(x=ONES, y=np.ones((4, 3))), "not one-hot; each picture", PARTS),
    "labels that are fractions": (arrays(x=ONES, y=TWO + 0.5), "the label 0.5 at index 0 is not an integer", PARTS),
    "labels that are not numbers": (arrays(x=ONES, y=TWO * np.nan), "the label nan at index 0", PARTS),
    "labels of another kind": (arrays(x=ONES, y=TWO + 1j), "integers or strings, got complex128", PARTS),
    "pixels of another kind": (arrays(x=ONES + 1j, y=TWO), "expected numeric pixels, got complex128", PARTS),
    "pixels that are not numbers": (arrays(x=ONES * np.nan, y=TWO), "a pixel is nan", PARTS),
    "negative pixels": (arrays(x=ONES - 2.0, y=TWO), "a pixel is -1", PARTS),
    "pixels beyond brightness": (arrays(x=ONES * 300.0, y=TWO), "a pixel is 300", PARTS),
    "pictures of five channels": (arrays(x=np.ones((4, 5, 6, 5)), y=TWO), "have no axis of 1 or 3 channels", PARTS),
    "pictures of five dimensions": (
        arrays(x=np.ones((4, 5, 5, 5, 3)), y=TWO), "expected pictures in 2 or 3 dimensions", PARTS),
    "pictures that may be either": (arrays(x=np.ones((4, 3, 5, 3)), y=TWO), "add --layout", PARTS),
    "pictures that are no squares": (arrays(x=np.ones((4, 7)), y=TWO), "7 values per picture are not a square", PARTS),
    "pictures too large": (arrays(x=np.ones((4, 1, 2000)), y=TWO), "images have at most 1024 x 1024", PARTS),
    "no pictures in the arrays": (arrays(x=ONES[:0], y=TWO[:0]), "no pictures found", PARTS),
    "an npy that is none": (lambda f: [put("set/x.npy", b"hello")(f), put("set/y.npy", npy(TWO))(f)] and f / "set",
                            "the file is not an npy array", PARTS),
    "an npy that is cut off": (
        lambda f: [put("set/x.npy", npy(ONES)[:-9])(f), put("set/y.npy", npy(TWO))(f)] and f / "set",
                               "the array is damaged", PARTS),
    # parquet
    "a parquet shard that is missing": (
        lambda f: [write_parquet(f / "set" / "data" / f"train-0000{n}-of-00004.parquet", IMAGES, LABELS)
                   for n in (0, 1, 3)] and f / "set", "data: train-00002-of-00004.parquet is missing", PARTS),
    "a parquet that is none": (only("a.parquet", b"PAR1hello"), "is not a parquet file, or is damaged", PARTS),
    "a parquet that is cut off": (hf([0, 1] * 10, ["a", "b"], cut=3000), "is not a parquet file", PARTS),
    "a parquet of other types": (shard(lambda pa: {"image": [[1, 2]] * 4, "label": [0, 1, 0, 1]}),
                                 "expected one picture column", PARTS),
    "a parquet without labels": (
        shard(lambda pa: {"image": [b"x"] * 4, "text": ["a"] * 4}), "name it by --label-column", PARTS),
    "a parquet of labels as floats": (
        shard(lambda pa: {"image": [b"x"] * 4, "label": [0.5] * 4}), "expected integers or strings", PARTS),
    "a parquet with missing labels": (shard(lambda pa: {"image": [b"x"] * 4, "label": [0, None, 1, 1]}),
                                      "1 rows lack a label", PARTS),
    "a parquet with missing pictures": (
        shard(lambda pa: {"image": [encoded(IMAGES[0]), None] * 2, "label": [0, 0, 1, 1]}),
        "no picture bytes", PARTS),
    "a parquet of text for pictures": (
        shard(lambda pa: {"image": [b"x"] * 4, "label": [0, 1] * 2}), "usable picture", PARTS),
    "a parquet without labels of the test part": (
        hf([0, 1, -1, 1], ["a", "b"]), "unlabelled pictures cannot", PARTS),
    "a parquet with labels beyond the names": (hf([0, 1, 2, 1], ["a", "b"]), "not one of the 2 classes", PARTS),
    "a parquet with a label twice": (
        hf([0, 1, 0, 1], ["a", "A b"]), "no column 'fine'", (*PARTS, "--label-column=fine")),
    "a parquet with two columns of a name": (twins, "two of its columns have the same name", PARTS),
    "a parquet that names a class twice": (
        hf([0, 1, 0, 1], ["a", "a"]), "a.parquet: classes 0 and 1 are both named 'a'", PARTS),
    # CIFAR and idx
    "a CIFAR batch that is a broken link": (
        cifar(lambda f: (f / "data_batch_9.bin").symlink_to("nowhere")), "data_batch_9.bin: cannot be read", ()),
    "a CIFAR set that names a class twice": (
        cifar(lambda f: (f / "batches.meta.txt").write_text("cat\n" * 10)), "set: classes 0 and 1 are both named", ()),
    "a CIFAR batch that is cut off": (
        cifar(lambda f: (f / "data_batch_2.bin").write_bytes(bytes(3072))), "not a multiple of 3073", ()),
    "a CIFAR batch with other labels": (
        cifar(lambda f: (f / "data_batch_2.bin").write_bytes(bytes([77]) + bytes(3072))),
        "the label 77 is not one of the 10", ()),
    "an idx file without labels": (idx_folder(a=GOOD_IDX), "images lack labels", PARTS),
    "an idx file that is cut off": (idx_folder(a=GOOD_IDX[:-1], b=GOOD_IDX), "is truncated", PARTS),
    "an idx file with names beyond": (
        idx_folder(a=GOOD_IDX, b=bytes([0, 0, 8, 1, 0, 0, 0, 2, 0, 9]), **{"classes.json": b'["x", "y"]'}),
        "the label 9 is not one of the 2 classes", PARTS),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_import_of_what_cannot_be_imported_is_a_sentence_and_leaves_nothing(case, tmp_path):
    make, sentence, options = HOSTILE[case]
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    source = make(tmp_path / "source")
    done = dist_mnist("data", "import", source, "--to", tmp_path / "target" / "new" / "set", *options)
    assert (done.returncode, done.stdout) == (2, ""), (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert sentence in done.stderr, done.stderr
    assert "\x1b" not in done.stderr and len(done.stderr) < 2500
    assert not list((tmp_path / "target").iterdir())


def test_import_of_an_archive_with_a_path_for_a_name_stays_in_its_folder(tmp_path):
    source = archive({"../../x_train.npy": npy(ONES), "/y_train.npy": npy(TWO)})(tmp_path)
    done = dist_mnist("data", "import", source, "--to", tmp_path / "set", "--test-fraction=0.5")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "set"]


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(command, tmp_path, write_set, monkeypatch):
    """A link to itself; something below a file; and where a file system is mounted, as a container's volume is."""
    source = write_set(IMAGES, LABELS.astype(np.uint8))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "mounted")
    before = sorted(tmp_path.iterdir())
    reasons = {"loop": "symbolic links", "file/x": "the folder cannot be created", "mounted": "is a mount point"}
    for name, why in reasons.items():
        to = ("--to", tmp_path / name) if command == "import" else ("--to", "npz", "--output", tmp_path / name)
        done = dist_mnist("data", command, source, *to)
        assert done.returncode == 2 and why in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert sorted(tmp_path.iterdir()) == before


def large_enough(folder: Path, kind: str) -> list[Path]:
    """Pictures for several pieces of work."""
    images, labels = np.concatenate([IMAGES] * 20), np.concatenate([LABELS] * 20)
    if kind == "csv":
        return [write_csv(folder / "a.csv", images, labels.tolist())]
    np.save(folder / "x.npy", images)
    np.save(folder / "y.npy", labels)
    return [folder / "x.npy", folder / "y.npy"]


@pytest.mark.parametrize(("kind", "sentence"), [
    ("csv", "a.csv has changed while it was read"), ("npy", "x.npy has shrunk while in use"),
])  # fmt: skip
def test_import_of_a_file_that_changes_meanwhile_is_refused(kind, sentence, tmp_path):
    """A table of other rows, whose labels are those that were; and an array that is cut off below its mapping."""
    files = large_enough(tmp_path, kind)

    def change(done: int, total: int) -> None:
        if kind == "csv":
            large_enough(tmp_path, kind)
        else:
            os.truncate(files[0], 10_000)

    with pytest.raises(UserError, match=sentence):
        import_pictures(files, tmp_path / "set", ImportOptions(test_fraction=0.2, jobs=1), change)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in files]
