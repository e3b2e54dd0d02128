"""Commands for datasets: data get, data make, data import, data info, data export, data suspects."""

import csv
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_mnist.cli.errors import unwound_by_signals
from dist_mnist.cli.options import JsonOutput, Nproc, OwnModels, print_json
from dist_mnist.data.convert.choices import Colour, Layout
from dist_mnist.data.convert.export import Format
from dist_mnist.data.sources.catalog import CATALOG, known
from dist_mnist.utils.errors import UserError, os_error_as

if TYPE_CHECKING:
    from dist_mnist.data.convert.summary import Progress

MAX_WHITE = 2**32

app = typer.Typer(no_args_is_help=True)


@app.command("get")
def data_get(
    name: Annotated[
        str,
        typer.Argument(
            help=f"name of the dataset: {', '.join(CATALOG)}", show_default=False, autocompletion=lambda: list(CATALOG)
        ),
    ],
    folder: Annotated[
        Path | None, typer.Option("--data-dir", help="folder to download to (default: data/<name>)")
    ] = None,
) -> None:
    """Download a known dataset. Existing files are verified, and downloaded again if damaged."""
    from dist_mnist.data.sources.resolve import DEFAULT_ROOT, get

    dataset = known(name)
    print(get(name, folder or DEFAULT_ROOT / name, verify=True))
    if dataset.note:
        print(f"{name}: {dataset.note}", file=sys.stderr)


@app.command("make")
def data_make(
    folder: Annotated[Path, typer.Option("--data-dir", help="folder to write to")] = Path("data/synthetic"),
    num_train: Annotated[int, typer.Option(min=1, help="number of training images")] = 60_000,
    num_test: Annotated[int, typer.Option(min=1, help="number of test images")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="random seed; the same seed gives the same images")] = 0,
) -> None:
    """Generate digits that resemble handwriting, in MNIST's format."""
    from dist_mnist.data.sources.files import has_files
    from dist_mnist.data.sources.synthetic import write_digits

    if has_files(folder):
        raise UserError(f"{folder} already holds a dataset and was not changed: give another --data-dir")
    with os_error_as(f"{folder}: cannot write data there", "give another --data-dir"):
        write_digits(folder, seed=seed, num_train=num_train, num_test=num_test)
    print(folder)


@app.command("import")
def data_import(
    source: Annotated[
        list[Path],
        typer.Argument(
            help="folder with a sub-folder of pictures for each class (or train/ and test/ folders of these); folder "
            "of CSV, npz, npy, parquet or idx files, or of CIFAR's binary version; or single files of these formats"
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="folder to write to: new, or empty")],
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="height and width of the images; pictures of another size are scaled to fit and centred (default: the "
            "size of the pictures, which must all be equal)",
        ),
    ] = None,
    gray: Annotated[
        bool,
        typer.Option(
            "--gray", metavar="", help="convert all images to grayscale (default: keep the colours of the source)"
        ),
    ] = False,
    color: Annotated[bool, typer.Option("--color", metavar="", help="convert all images to RGB")] = False,
    invert: Annotated[bool, typer.Option("--invert", metavar="", help="invert the brightness of all pixels")] = False,
    test_fraction: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="fraction of each class held out as the test split, if the source has none; 0: write a training "
            "split only",
        ),
    ] = None,
    merge_validation: Annotated[
        bool,
        typer.Option(
            "--merge-validation",
            metavar="",
            help="add the source's validation split to the training split (default: ignore it, or use it as the test "
            "split if there is no other)",
        ),
    ] = False,
    classes: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="classes to import, in label order (default: all)")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="largest number of images per split, sampled from each class by --seed"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="random seed of --test-fraction and --limit")] = 0,
    jobs: Annotated[
        int, typer.Option(min=0, max=1024, help="worker processes; 0: one per core, or none for few pictures")
    ] = 0,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", metavar="", help="skip unusable pictures (default: one of them stops the import)"),
    ] = False,
    layout: Annotated[
        Layout | None,
        typer.Option(help="axis order of colour images in arrays and tables, if their shape is ambiguous"),
    ] = None,
    pixel_max: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="pixel value of white; black is 0 (default: 255; 1 if all values are 0 to 1; 65535 for 16 bits)",
        ),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="label column: a name in the header, first, last, or a number from 0"),
    ] = None,
    as_json: JsonOutput = False,
) -> None:
    """Convert pictures, tables or arrays to a folder of idx files with class names."""
    from dist_mnist.cli.tables import import_page
    from dist_mnist.data.convert.importing import import_pictures
    from dist_mnist.data.convert.plan import ImportOptions

    if gray and color:
        raise UserError("--gray and --color contradict each other; give one of them")
    if pixel_max is not None and not 0 < pixel_max <= MAX_WHITE:
        raise UserError(f"--pixel-max expects a number above 0, such as 16 or 4095, got {pixel_max:g}")
    options = ImportOptions(
        size=None if size is None else _size(size),
        colour=Colour.GRAY if gray else Colour.COLOUR if color else Colour.AS_IS,
        invert=invert,
        test_fraction=test_fraction,
        merge_validation=merge_validation,
        classes=None if classes is None else _names(classes),
        limit=limit,
        seed=seed,
        jobs=jobs,
        skip_bad=skip_bad,
        layout=layout,
        label_column=label_column,
        pixel_max=pixel_max,
    )
    with unwound_by_signals(), _progress_bar("pictures") as progress:
        summary = import_pictures(source, to, options, progress)
    print_json(summary) if as_json else import_page(summary)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,4})[xX]([0-9]{1,4})", text.strip())
    if not found or not int(found[1]) or not int(found[2]):
        raise UserError(f"--size expects HEIGHTxWIDTH, such as 28x28, got {text!r}")
    return int(found[1]), int(found[2])


def _names(text: str) -> tuple[str, ...]:
    try:
        [names] = csv.reader([text], skipinitialspace=True) if text.strip() else [[]]
    except csv.Error as error:
        raise UserError(f"--classes expects comma-separated names, such as cat,dog ({error})") from None
    return tuple(names)


@app.command("info")
def data_info(
    folder: Annotated[Path, typer.Argument(help="folder of idx files")],
    seen: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="contact sheet to write: some training images of each class")
    ] = None,
    as_json: JsonOutput = False,
) -> None:
    """Describe a folder of idx files: classes, counts, exact duplicates, blank images."""
    from dist_mnist.cli.tables import facts_table
    from dist_mnist.data.convert.describe import describe

    if seen and seen.suffix.lower() != ".png":
        raise UserError(f"--seen {seen}: the contact sheet is a PNG file; give a name that ends with .png")
    with unwound_by_signals(), _progress_bar("images") as progress:
        facts = describe(folder, seen, progress)
    print_json(facts) if as_json else facts_table(str(folder), facts)


@app.command("export")
def data_export(
    folder: Annotated[Path, typer.Argument(help="folder of idx files")],
    kind: Annotated[
        Format,
        typer.Option(
            "--to",
            help="pictures: PNG files in one folder per class; npz: arrays x_train, y_train, x_test, y_test; csv: one "
            "row of label and pixels per image",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="folder to write to, new or empty (default: FOLDER-pictures, for example)"),
    ] = None,
) -> None:
    """Convert a folder of idx files to pictures, an npz archive or CSV tables: the reverse of data import."""
    from dist_mnist.data.convert.export import export_dataset

    output = output or Path(f"{folder.resolve().name}-{kind}")
    with unwound_by_signals(), _progress_bar("images") as progress:
        export_dataset(folder, kind, output, progress)
    print(output)


@app.command("suspects")
def data_suspects(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run directory whose data and settings to use")],
    folds: Annotated[int, typer.Option(min=2, metavar="N", help="number of folds; each trains one network")] = 5,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="folder for the runs of all folds and the result (default: RUN-suspects)"),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder of idx files (default: as in training)")] = None,
    model: OwnModels = None,
    nproc: Nproc = 0,
) -> None:
    """List training images whose label is probably wrong, by confident learning.

    For each fold of the training images, a network is trained on all others with
    RUN's settings and predicts that fold. The same command resumes after an
    interruption. It writes suspects.json, suspects.csv and a contact sheet.
    """
    import numpy as np

    from dist_mnist.cli.tables import suspects_table
    from dist_mnist.distributed.device import use_device
    from dist_mnist.distributed.world import World
    from dist_mnist.reporting.figures import MOST_DRAWN, draw_sheet, drawn_name
    from dist_mnist.tools.suspects.folds import FoldRuns, write_suspects

    folder = output or run.resolve().with_name(f"{run.resolve().name}-suspects")
    trainings = FoldRuns(run, folder, folds, data_dir, model or (), nproc)
    if not trainings.train():
        print("stopped before all folds were trained; run the same command to resume")
        return
    with unwound_by_signals():
        found, images = trainings.find(use_device(World.from_environment().alone()))
        files = [*write_suspects(folder, found)]
        if shown := found.suspects[:MOST_DRAWN]:
            files.append(folder / "suspects.png")
            captions = [
                f"{one.index}: {drawn_name(one.given_name, one.given, 14)}, rather "
                f"{drawn_name(one.suggested_name, one.suggested, 14)} ({one.suggested_confidence:.0%})"
                for one in shown
            ]
            draw_sheet(files[-1], [*images.images_at(np.array([one.index for one in shown]))], captions, columns=8)
    suspects_table(found)
    for file in files:
        print(file)


@contextmanager
def _progress_bar(what: str) -> "Iterator[Progress]":
    """Show progress on standard error if it is a terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
