"""Command-line options, generated from the declarations of the settings."""

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_mnist.cli.errors import ending_in_time, lost_ranks, user_errors
from dist_mnist.config.fields import Duration, Ints, Names, Setting
from dist_mnist.config.overrides import Overrides
from dist_mnist.config.recipes import RECIPES
from dist_mnist.config.settings import FIELDS
from dist_mnist.config.toml import read_settings, to_toml
from dist_mnist.elastic.preemption import StopSignal
from dist_mnist.elastic.torchrun import become_rank
from dist_mnist.run.plan import settings_of
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.files import to_json

# Short metavars leave room for the help text on an 80-column terminal.
METAVARS = {int: "N", float: "X", Path: "PATH", bool: "", Ints: "N,N", Duration: "TIME"}

JsonOutput = Annotated[bool, typer.Option("--json", metavar="", help="print JSON instead of tables")]

run_option = partial(typer.Option, rich_help_panel="Run")

OwnModels = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="FILE.py:NAME",
        help="class or function of your own network; code is never loaded from a checkpoint; may be repeated",
    ),
]

TestFraction = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=0.99,
        metavar="X",
        help="fraction of the training images held out as the test split if the data has no test images (default: as "
        "in training)",
    ),
]

Nproc = Annotated[int, run_option(min=0, metavar="N", help="processes on this node; 0: one per GPU, or one on a CPU")]


def with_settings(function: Callable[..., None]) -> Callable[..., None]:
    """Return a Typer command with an option for each setting, from `function(overrides, ...)`.

    `function` gets the settings from the command line and `--config` as its first argument, an `Overrides`. Its other
    parameters become Typer options as usual.
    """

    def run_command(
        *,
        config: Annotated[
            Path | None, run_option(metavar="FILE.toml", help="TOML file of settings, which override the recipe")
        ] = None,
        print_config: Annotated[
            bool, run_option("--print-config", metavar="", help="print all settings as a file for --config, and exit")
        ] = False,
        **options: Any,
    ) -> None:
        given = {name: options.pop(name) for name in FIELDS}
        overrides = Overrides({name: None if value == [] else value for name, value in given.items()})
        if config is not None:
            overrides = overrides.over(read_settings(config))
        if print_config:
            print(to_toml(settings_of(overrides, overrides.run_dir)[0], overrides))
        else:
            function(overrides, **options)

    own = list(inspect.signature(function).parameters.values())[1:]
    files = list(inspect.signature(run_command).parameters.values())[:-1]
    settings = [_parameter(field) for field in FIELDS.values()]
    run_command.__signature__ = inspect.Signature([*own, *files, *settings])  # type: ignore[attr-defined]
    run_command.__name__, run_command.__doc__ = function.__name__, function.__doc__
    return run_command


def run_as_rank(
    function: Callable[[Overrides, StopSignal], object], stop: StopSignal, own_process: bool = False
) -> None:
    """Parse the command line and call `function` with the given settings, as a rank of a launcher or a single process.

    A UserError or the loss of another rank ends the process with a one-line error. With `own_process` the process has
    nothing else to do, and ends soon even if threads of listeners still run.
    """

    def command(
        overrides: Overrides,
        local_rank: Annotated[int | None, typer.Option(hidden=True)] = None,  # passed by torch.distributed.launch
    ) -> None:
        function(overrides, stop)

    command.__doc__ = function.__doc__
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(with_settings(command))

    from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def main() -> None:
        with ending_in_time() if own_process else nullcontext(), lost_ranks(stop), user_errors(stop):
            become_rank()
            app()

    main()


def _parameter(field: Setting) -> inspect.Parameter:
    parser = {Ints: _parse_ints, Duration: field.coerce}.get(field.kind)
    option = typer.Option(
        help=_help(field),
        rich_help_panel=field.group,
        show_default=False,
        metavar=METAVARS.get(field.kind, "NAME"),
        parser=parser,
        autocompletion=(lambda: list(RECIPES)) if field.name == "recipe" else None,
    )
    kind: Any = {Ints: tuple, Names: list[str], Duration: float}.get(field.kind, field.kind)
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(field: Setting) -> str:
    """Return the help text with choices or limits, and the default."""
    choices = tuple(RECIPES) if field.name == "recipe" else field.choices
    limits = [f"{limit:g}" if math.isfinite(limit) else "" for limit in (field.minimum, field.maximum)]
    shown = [" | ".join(choices)] if choices else [f"{limits[0]}..{limits[1]}"] if any(limits) else []
    if field.default not in (None, "", ()):
        default = field.default
        text = ",".join(map(str, default)) if isinstance(default, tuple) else default
        shown.append(f"default: {str(text).lower() if isinstance(text, bool) else text}")
    return field.help + (f" \\[{'; '.join(shown)}]" if shown else "")


def _parse_ints(text: str) -> Ints:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"expected comma-separated integers, such as 32,64, got {text!r}") from None


def print_json(value: object) -> None:
    """Print a value as JSON."""
    print(to_json(value, indent=2))
