"""Import a source: read its pictures on all cores, and write them to a folder of idx files that appears atomically."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np

from dist_mnist.data.convert.choices import Colour, Split
from dist_mnist.data.convert.pictures import MAX_SIDE, Form, Read, Shape, Unusable, read_work, without_warnings
from dist_mnist.data.convert.plan import ImportOptions, Plan, check_classes, make_plan, without
from dist_mnist.data.convert.readers.pixels import BYTES
from dist_mnist.data.convert.readers.recognise import open_source
from dist_mnist.data.convert.readers.source import Reading
from dist_mnist.data.convert.summary import (
    RECORD,
    ClassCount,
    Progress,
    SizeCount,
    Summary,
    count_duplicates,
    no_progress,
)
from dist_mnist.data.convert.workers import ordered_map
from dist_mnist.data.idx import Header, open_idx, write_idx
from dist_mnist.data.sources.classes import write_class_names
from dist_mnist.data.sources.contact_sheet import contact_sheet
from dist_mnist.distributed.cores import num_cores
from dist_mnist.utils.errors import UserError, os_error_as
from dist_mnist.utils.files import atomic_folder, check_new_folder, path_text, sync

CONTACT_SHEET = "contact-sheet.png"
PREFIXES = {Split.TRAIN: "train", Split.TEST: "t10k"}
PIECE_BYTES = 1 << 20  # of images in a work item
READ_BYTES = 1 << 23  # of decoded pictures in a work item, which may be larger than its images
MAX_PIECE = 256  # pictures in a work item
FEW_BYTES = 1 << 23  # of pictures, which are read faster than worker processes start
PROBED = 1000  # first pictures, one of which must be usable
MOST_LISTED = 100  # unusable files listed in the summary
MOST_SAID = 10  # unusable files listed in an error
DIM = 64  # if the brightest pixel is below this, the summary warns that the scale may be wrong
MOST_SHAPES = 10_000  # distinct shapes of pictures that are counted


@dataclass
class Tally:
    """Statistics of the pictures read so far."""

    shapes: Counter[Shape] = field(default_factory=Counter)
    examples: dict[Shape, str] = field(default_factory=dict)
    unusable: list[str] = field(default_factory=list)
    num_unusable: int = 0
    brightest: int = 0
    unfit: list[int] = field(default_factory=list)  # indices of pictures that are unusable or have another shape
    seen: int = 0

    def add(self, read: Read) -> None:
        """Add the result of a work item."""
        for shape, count in read.shapes.items():
            if shape in self.shapes or len(self.shapes) < MOST_SHAPES:
                self.shapes[shape] += count
                self.examples.setdefault(shape, read.examples[shape])
        self.brightest = max(self.brightest, read.brightest)
        self.unfit += (self.seen + np.flatnonzero(~read.fits)).tolist()
        self.seen += len(read.fits)
        self.num_unusable += len(read.unusable)
        self.unusable += read.unusable[: MOST_LISTED - len(self.unusable)]


def import_pictures(
    sources: Sequence[Path],
    folder: Path,
    options: ImportOptions,
    progress: Progress = no_progress,
) -> Summary:
    """Import the pictures in a folder, or in files of one kind, to `folder`, which appears atomically.

    The same input gives the same bytes for any number of jobs.

    Raises:
        UserError: the source cannot be imported with these options, or the folder is not empty or not writable.
    """
    check_new_folder(folder, "give another folder")
    for source in sources:
        if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{folder} is inside the source {source}; give a folder outside it")
    with (
        os_error_as(f"{folder}: the dataset cannot be stored there", "free some space, or give another folder"),
        atomic_folder(folder) as unfinished,
    ):
        return _import(sources, folder, unfinished, options, progress)


def _import(
    sources: Sequence[Path],
    folder: Path,
    unfinished: Path,
    options: ImportOptions,
    progress: Progress,
) -> Summary:
    with tempfile.TemporaryDirectory(dir=unfinished, prefix=".unpacked-") as scratch:
        reading = Reading(
            size=options.size, layout=options.layout, label_column=options.label_column, pixel_max=options.pixel_max
        )
        plan = make_plan(open_source(sources, reading, Path(scratch)), options)
        first = _first_shape(plan)
        form = _form(first, options)
        tally = Tally()
        reads = _read_all(plan, form, first, options.jobs)
        records = _write_images(plan, form.shape, reads, unfinished, tally, progress)
        _check(plan, records, tally, form, options)
        if tally.num_unusable and options.test_fraction and options.limit is None:  # sample from the usable ones only
            plan = without(plan, np.array(tally.unfit), options)
            reads = _read_all(plan, form, first, options.jobs)
            records = _write_images(plan, form.shape, reads, unfinished, Tally(), progress)
        plan.source.check_unchanged()
    check_classes(records[Split.TRAIN]["label"], plan.classes, plan.is_fixed)
    for split, prefix in PREFIXES.items():
        if options.test_fraction == 0 and split == Split.TEST:
            (unfinished / _images_name(split, form.shape)).unlink()
            continue
        labels = records[split]["label"]
        is_small = len(plan.classes) <= 256
        name = f"{prefix}-labels-idx1-{'ubyte' if is_small else 'int'}"
        write_idx(unfinished / name, labels.astype(np.uint8) if is_small else labels)
    write_class_names(unfinished, plan.classes)
    images = open_idx(unfinished / _images_name(Split.TRAIN, form.shape))
    contact_sheet(
        images.reshape(-1, *form.shape), records[Split.TRAIN]["label"], plan.classes, unfinished / CONTACT_SHEET
    )
    return _summary(plan, records, tally, form, folder, options)


def _form(first: Shape, options: ImportOptions) -> Form:
    """Return the form of the images: by the options, else like the first picture."""
    height, width = options.size or (first.height, first.width)
    if options.size and max(height, width) > MAX_SIDE:
        raise UserError(f"--size {height}x{width}: images have at most {MAX_SIDE} x {MAX_SIDE} pixels")
    if max(height, width) > MAX_SIDE:
        raise UserError(
            f"the first picture has {height} x {width} pixels, but images have at most {MAX_SIDE} x {MAX_SIDE}: scale "
            "them by --size HxW"
        )
    channels = {Colour.AS_IS: first.channels, Colour.GRAY: 1, Colour.COLOUR: 3}[options.colour]
    return Form(
        Shape(height, width, channels),
        may_resize=options.size is not None,
        may_recolour=options.colour != Colour.AS_IS,
        invert=options.invert,
    )


def _first_shape(plan: Plan) -> Shape:
    """Return the shape of the first usable picture.

    Raises:
        UserError: none of the first thousand is usable.
    """
    why = ""
    works = (work for part, labels, _ in plan.parts for work in part.work(labels >= 0, 1))
    with without_warnings():
        for picture in islice((picture for work in works for picture in work.read()), PROBED):
            if not isinstance(picture, Unusable):
                return Shape(*picture.shape)
            why = why or picture.why
    raise UserError(f"none of the first {min(PROBED, plan.total)} files is a usable picture; the first error: {why}")


def _images_name(split: Split, shape: Shape) -> str:
    return f"{PREFIXES[split]}-images-idx{3 if shape.channels == 1 else 4}-ubyte"


def _read_all(plan: Plan, form: Form, first: Shape, jobs: int) -> Generator[Read, None, None]:
    """Read all pictures of a plan in order, in work items sized by the first picture and the images."""
    size = max(1, min(MAX_PIECE, PIECE_BYTES // form.shape.num_bytes, READ_BYTES // first.num_bytes))
    works = (work for part, labels, _ in plan.parts for work in part.work(labels >= 0, size))
    own = 1 if plan.total * first.num_bytes <= FEW_BYTES else num_cores()
    return ordered_map(partial(read_work, form), works, jobs or own)


def _write_images(
    plan: Plan,
    shape: Shape,
    reads: Generator[Read, None, None],
    folder: Path,
    tally: Tally,
    progress: Progress,
) -> dict[Split, np.ndarray]:
    """Write the two image files, and return a record of each image."""
    total = plan.total
    _check_room(total * shape.num_bytes, folder)
    labels = np.concatenate([labels[labels >= 0] for _, labels, _ in plan.parts])
    is_test = np.concatenate([is_test[labels >= 0] for _, labels, is_test in plan.parts])
    records: dict[Split, list[np.ndarray]] = {split: [] for split in PREFIXES}
    with ExitStack() as stack:
        stack.enter_context(closing(reads))  # ends the worker processes
        files = {split: stack.enter_context(open(folder / _images_name(split, shape), "wb")) for split in PREFIXES}
        for file in files.values():
            file.write(_header(0, shape))
        done = 0
        for read in reads:
            rows = done + np.flatnonzero(read.fits)
            done += len(read.fits)
            tally.add(read)
            for split, file in files.items():
                chosen = is_test[rows] == (split == Split.TEST)
                file.write(read.images[chosen].data)
                some = read.records[chosen]
                some["label"] = labels[rows][chosen]
                records[split].append(some)
            progress(done, total)
        whole = {split: np.concatenate([np.empty(0, RECORD), *some]) for split, some in records.items()}
        for split, file in files.items():
            _finish(file, _header(len(whole[split]), shape), folder)
    return whole


def _header(count: int, shape: Shape) -> bytes:
    sizes = shape[:2] if shape.channels == 1 else shape
    return Header(np.dtype(np.uint8), (count, *sizes)).to_bytes()


def _finish(file: IO[bytes], header: bytes, folder: Path) -> None:
    file.seek(0)
    file.write(header)
    file.flush()
    sync(file.fileno(), folder)


def _check_room(num_bytes: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(f"the images need {num_bytes:,} bytes, but {folder.parent} has {free:,} free; free some space")


def _check(plan: Plan, records: dict[Split, np.ndarray], tally: Tally, form: Form, options: ImportOptions) -> None:
    """Check, after all pictures have been read, that they make a dataset.

    Raises:
        UserError: pictures are unusable, or differ in size or colour; the message has the fix.
    """
    faults = []
    if tally.num_unusable and not options.skip_bad:
        said = "; ".join(tally.unusable[:MOST_SAID])
        more = f"; and {tally.num_unusable - MOST_SAID} more" if tally.num_unusable > MOST_SAID else ""
        faults.append(
            f"{tally.num_unusable} of {plan.total} pictures are unusable (--skip-bad skips them): {said}{more}"
        )
    if not form.may_recolour and len({shape.channels for shape in tally.shapes}) > 1:
        faults.append(f"some pictures are gray, some RGB ({_by_colour(tally)}): add --gray or --color")
    if not form.may_resize and len({shape[:2] for shape in tally.shapes}) > 1:
        faults.append(f"pictures have different sizes ({_by_size(tally)}): add --size HxW")
    if faults:
        raise UserError("; ".join(faults))
    if not len(records[Split.TEST]) and options.test_fraction != 0:
        raise UserError("no picture of the test split is usable; training needs test images")


def _by_colour(tally: Tally) -> str:
    counts: Counter[int] = Counter()
    examples: dict[int, str] = {}
    for shape, count in tally.shapes.items():
        counts[shape.channels] += count
        examples.setdefault(shape.channels, tally.examples[shape])
    return ", ".join(
        f"{counts[channels]} {'gray' if channels == 1 else 'RGB'}, such as {examples[channels]}"
        for channels in sorted(counts)
    )


def _by_size(tally: Tally) -> str:
    counts: Counter[tuple[int, int]] = Counter()
    for shape, count in tally.shapes.items():
        counts[shape.height, shape.width] += count
    examples = {(shape.height, shape.width): name for shape, name in tally.examples.items()}
    said = [f"{h}x{w}: {count}, such as {examples[h, w]}" for (h, w), count in counts.most_common(5)]
    return "; ".join(said) + (f"; and {len(counts) - 5} more" if len(counts) > 5 else "")


def _summary(
    plan: Plan, records: dict[Split, np.ndarray], tally: Tally, form: Form, folder: Path, options: ImportOptions
) -> Summary:
    train, test = records[Split.TRAIN], records[Split.TEST]
    counts = [np.bincount(found["label"], minlength=len(plan.classes)).tolist() for found in (train, test)]
    duplicates = count_duplicates(train, test)
    notes = [*plan.notes]
    if options.test_fraction == 0:
        notes.append("there is no test split (--test-fraction 0): train with --test-fraction")
    elif options.test_fraction:
        notes.append(f"held out {len(test)} training pictures as the test split, by seed {options.seed}")
    if tally.brightest < DIM:
        white = tally.brightest if plan.source.white == BYTES else "N"
        notes.append(
            f"the brightest pixel is {tally.brightest} of 255; --pixel-max {white} makes the source's value {white} "
            "white"
        )
    if any(shape[:2] != form.shape[:2] for shape in tally.shapes):
        notes.append(f"scaled pictures of other sizes to fit {form.shape.height} x {form.shape.width}")
    common = tally.shapes.most_common(10)
    return Summary(
        folder=path_text(folder),
        source=plan.source.kind,
        image_shape=(form.shape.height, form.shape.width, form.shape.channels),
        training_images=len(train),
        test_images=len(test),
        classes=tuple(map(ClassCount, plan.classes, *counts)),
        source_sizes=tuple(SizeCount(*shape, pictures=count) for shape, count in common),
        other_sizes=len(tally.shapes) - len(common),
        duplicates_in_training=duplicates.in_training,
        duplicates_in_test=duplicates.in_test,
        test_images_in_training=duplicates.between,
        duplicates_of_other_classes=duplicates.of_other_classes,
        blank_images=int(train["blank"].sum() + test["blank"].sum()),
        unusable_pictures=tally.num_unusable,
        unusable=tuple(tally.unusable),
        notes=tuple(notes),
        contact_sheet=path_text(folder / CONTACT_SHEET),
    )
