"""Command-line options made from the settings' declarations, and users' errors as one line."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_mnist.cli.errors import lost_ranks, user_errors
from dist_mnist.config.recipes import RECIPES
from dist_mnist.config.settings import FIELDS, Ints, value_type
from dist_mnist.config.toml import merge, read_settings, to_toml
from dist_mnist.elastic.preemption import StopSignal
from dist_mnist.run.plan import settings_of
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.files import to_json


def _keyword(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


FILES = (
    _keyword(
        "config", Path | None, None,
        typer.Option(metavar="FILE.toml", rich_help_panel="Run", help="file of settings; they win over a recipe's"),
    ),
    _keyword(
        "print_config", bool, False,
        typer.Option("--print-config", rich_help_panel="Run", help="only print all settings, as such a file"),
    ),
)  # fmt: skip


def with_settings(function: Callable[..., None]) -> Callable[..., None]:
    """A Typer command with an option for each setting, from `function(given, ...)`.

    What the user gave reaches `function` as its first argument, a mapping from settings' names to values; its other
    parameters become options as Typer makes them.
    """

    def run_command(**options: Any) -> None:
        of_command_line = {name: options.pop(name) for name in FIELDS}
        given = {name: value for name, value in of_command_line.items() if value is not None}
        file, only_print = options.pop("config"), options.pop("print_config")
        if file is not None:
            given = merge(read_settings(file), given)
        if only_print:
            print(to_toml(settings_of(given, given.get("run_dir"))[0], given))
            return
        function(given, **options)

    own = list(inspect.signature(function).parameters.values())[1:]
    settings = [_parameter(declared) for declared in FIELDS.values()]
    run_command.__signature__ = inspect.Signature([*own, *FILES, *settings])  # type: ignore[attr-defined]
    functools.update_wrapper(run_command, function, assigned=("__name__", "__doc__"), updated=())
    del run_command.__wrapped__  # type: ignore[attr-defined]  # Typer is to see this signature, not that one
    return run_command


def run_as_rank(function: Callable[[Mapping[str, Any], StopSignal], None], stop: StopSignal) -> None:
    """Parse the command line and call `function` with the settings given, in a rank of torchrun's or by itself.

    A user's mistake ends the process with a sentence, and so does the loss of another rank.
    """

    def command(given: Mapping[str, Any]) -> None:
        function(given, stop)

    command.__doc__ = function.__doc__
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(with_settings(command))

    from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def main() -> None:
        with lost_ranks(stop), user_errors(stop):
            app()

    main()


def _parameter(declared: dataclasses.Field) -> inspect.Parameter:
    kind = value_type(declared)
    # Short names of the values' kinds leave an 80-column terminal room for the help.
    extra: dict[str, Any] = {"metavar": {int: "N", float: "X", Path: "PATH", str: "NAME", bool: "", Ints: "N,N"}[kind]}
    if kind == Ints:
        extra["parser"], kind = _parse_ints, tuple
    if choices := _choices(declared):
        extra["autocompletion"] = lambda: list(choices)
    option = typer.Option(help=_help(declared), rich_help_panel=declared.metadata["group"], show_default=False, **extra)
    return _keyword(declared.name, kind | None, None, option)


def _choices(declared: dataclasses.Field) -> tuple[str, ...]:
    return tuple(RECIPES) if declared.name == "recipe" else declared.metadata["choices"]


def _help(declared: dataclasses.Field) -> str:
    """The help text with its limits and the default recipe's value."""
    facts, default = declared.metadata, declared.default
    limits = [f"{facts[name]:g}" if math.isfinite(facts[name]) else "" for name in ("minimum", "maximum")]
    choices = _choices(declared)
    shown = [" | ".join(choices)] if choices else [f"{limits[0]}..{limits[1]}"] if any(limits) else []
    if default is not None:
        text = ",".join(map(str, default)) if isinstance(default, tuple) else default
        shown.append(f"default: {str(text).lower() if isinstance(text, bool) else text}")
    return facts["help"] + (f" \\[{'; '.join(shown)}]" if shown else "")


def _parse_ints(text: str) -> Ints:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"expected whole numbers separated by commas, such as 32,64; {text!r} was given") from None


JsonOutput = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


Nproc = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        rich_help_panel="Run",
        help="processes on this machine; 0: one for each GPU, or one on a CPU",
    ),
]


def print_json(value: Any) -> None:
    print(to_json(value, indent=2))
