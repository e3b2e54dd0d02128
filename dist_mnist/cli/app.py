"""The `dist-mnist` command. Sub-commands are short calls of the library and import heavy modules on demand."""

from typing import Annotated

import typer

from dist_mnist.cli import data, inference, runs, training
from dist_mnist.cli.errors import user_errors
from dist_mnist.utils.imports import let_threads_sleep

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Train and use CNNs on small images in the idx format."
)
for group in (training.app, inference.app, runs.app):
    app.add_typer(group)
app.add_typer(data.app, name="data", help="Download, generate, import, export and inspect datasets; find wrong labels.")
app.add_typer(runs.ckpt, name="ckpt", help="List, verify and show checkpoints.")


def main() -> None:
    """Entry point: a UserError is printed as one line, with exit code 2."""
    let_threads_sleep()
    with user_errors():
        app()


def _print_version(wanted: bool) -> None:
    if wanted:
        from dist_mnist.utils.versions import versions

        own, *others = sorted(versions().items())
        print("{} {} ({})".format(*own, ", ".join(map(" ".join, others))))
        raise typer.Exit


@app.callback()
def _(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=_print_version, is_eager=True, help="Print versions and exit."),
    ] = False,
) -> None: ...
