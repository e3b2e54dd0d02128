"""Commands for datasets: data get, data make, data info, data export."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dist_mnist.cli.options import JsonOutput, print_json
from dist_mnist.data.convert.export import Format
from dist_mnist.data.sources.catalog import CATALOG, known
from dist_mnist.utils.errors import UserError, os_error_as

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
        Path | None, typer.Option("--data-dir", help="folder to put it in (default: data/<name>)")
    ] = None,
) -> None:
    """Download a known dataset; files that are there are checked, and replaced if they are not whole."""
    from dist_mnist.data.sources.resolve import DEFAULT_ROOT, get

    dataset = known(name)
    print(get(name, folder or DEFAULT_ROOT / name, verify=True))
    if dataset.note:
        print(f"{name}: {dataset.note}", file=sys.stderr)


@app.command("make")
def data_make(
    folder: Annotated[Path, typer.Option("--data-dir", help="folder to put it in")] = Path("data/synthetic"),
    num_train: Annotated[int, typer.Option(min=1, help="number of training images")] = 60_000,
    num_test: Annotated[int, typer.Option(min=1, help="number of test images")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="random seed; the same seed makes the same images")] = 0,
) -> None:
    """Generate handwritten-like digits in MNIST's format."""
    from dist_mnist.data.sources.files import has_files
    from dist_mnist.data.sources.synthetic import write_digits

    if has_files(folder):
        raise UserError(f"{folder} holds a dataset already; it is left as it is: give another --data-dir")
    with os_error_as(f"{folder}: data cannot be stored there", "give another --data-dir"):
        write_digits(folder, seed=seed, num_train=num_train, num_test=num_test)
    print(folder)


@app.command("info")
def data_info(
    folder: Annotated[Path, typer.Argument(help="folder of idx files")],
    seen: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="write a contact sheet: some training images of each class")
    ] = None,
    as_json: JsonOutput = False,
) -> None:
    """Describe a folder of idx files: classes, counts, exact duplicates, blank images."""
    from dist_mnist.cli.tables import facts_table
    from dist_mnist.data.splits import describe

    facts = describe(folder, seen)
    print_json(facts) if as_json else facts_table(str(folder), facts)


@app.command("export")
def data_export(
    folder: Annotated[Path, typer.Argument(help="folder of idx files")],
    kind: Annotated[
        Format,
        typer.Option(
            "--to",
            help="pictures: PNG files in a folder for each class; npz: x_train, y_train, x_test, y_test; csv: a row of "
            "label and pixels for each image",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="folder to make, new or empty (default: FOLDER-pictures or so)"),
    ] = None,
) -> None:
    """Convert a folder of idx files to pictures, an npz archive or CSV tables: the way back from data import."""
    from dist_mnist.data.convert.export import export_dataset

    output = output or Path(f"{folder.resolve().name}-{kind}")
    with _progress_bar("images") as progress:
        export_dataset(folder, kind, output, progress)
    print(output)


@contextmanager
def _progress_bar(what: str) -> Iterator[Callable[[int, int], object]]:
    """Show progress on standard error, if it is a terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
