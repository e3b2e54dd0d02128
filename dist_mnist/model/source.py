"""The source of a network: a built-in family, a library of networks, or the user's own code.

Code is imported only for a name on the command line, in a settings file or from the calling program, never because a
run directory, a checkpoint or a data folder names it. Nothing here needs torch before a network is built.
"""

import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, NoneType
from typing import TYPE_CHECKING, Any, ClassVar

from dist_mnist.config.settings import LIBRARIES, is_own_code
from dist_mnist.utils.errors import UserError, is_out_of_memory, short, unknown
from dist_mnist.utils.files import file_sha256

if TYPE_CHECKING:
    from torch import nn

FAMILIES = {"mlp": "MLP", "resnet": "ResNet"}  # besides the CNN, which is configured by settings
BUILT_IN = ("cnn", *FAMILIES)
# Arguments of libraries that download or unpickle weights.
WEIGHTS = ("pretrained", "weights", "weights_backbone", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
FORMS = "cnn, mlp, resnet, torchvision:NAME, timm:NAME, or your own code as FILE.py:NAME or package.module:NAME"
PASSED = ("image_shape", "num_classes")
SETTLED = ("in_chans", "device", "dtype")  # arguments of libraries that a run's images and settings determine
_NUMBER = (int, float, NoneType)
_FITTING: dict[type, tuple[type, ...]] = {bool: (bool, NoneType), int: _NUMBER, float: _NUMBER}  # by a default's type
_SET_HERE = (*PASSED, *SETTLED, *WEIGHTS)
# torchvision networks that, in train mode, also return the logits of auxiliary heads.
AUXILIARY = ("googlenet", "inception_v3")


class NotInstalled(UserError):
    """A library of networks is not installed, or cannot be imported."""


@dataclass(frozen=True)
class UserCode:
    """The user's own code that `option` names, in the file or module `origin`."""

    origin: str
    name: str
    option: str = "--model"
    wanted: ClassVar[str] = "a class, or a function that returns an instance"

    @classmethod
    def of(cls, text: str, option: str) -> "UserCode":
        """Parse a text such as FILE.py:NAME."""
        origin, _, name = text.rpartition(":")
        return cls(origin, name, option)

    def __str__(self) -> str:
        return f"{self.origin}:{self.name}" if self.origin else self.name

    @property
    def is_file(self) -> bool:
        """Whether the code is in a file, not in an importable module."""
        return self.origin.endswith(".py")

    def check_file(self) -> None:
        """Raise a UserError if the code's file does not exist; nothing is imported."""
        if self.is_file and not Path(self.origin).is_file():
            raise UserError(f"{self.option} {self}: there is no file {Path(self.origin).absolute()}")

    def path(self) -> Path | None:
        """Return the code's file; None for a module without a file.

        Raises:
            UserError: the file or module does not exist.
        """
        self.check_file()
        if self.is_file:
            return Path(self.origin)
        _find_modules_here()
        found = None
        with users_code(f"{self.option} {self}"), suppress(ModuleNotFoundError):
            found = importlib.util.find_spec(self.origin)
        if found is None:
            raise UserError(
                f"{self.option} {self}: there is no module {self.origin}: install it, or run in the folder that has it"
            )
        return Path(found.origin) if found.has_location and found.origin else None

    def find(self) -> Callable[..., Any]:
        """Import the code, and return the class or function of that name.

        Raises:
            UserError: the import fails, the name does not exist, or it is not callable.
        """
        module = self._import()
        found = getattr(module, self._attribute, None)
        if found is None:
            names = [name for name, value in vars(module).items() if _is_factory(value, module)]
            raise UserError(f"{self.option}: {unknown(f'name in {self.origin}:', self.name, names)}")
        if not self._can_make(found):
            raise UserError(f"{self.option} {self} is {kind_of(found)}: name {self.wanted}")
        return found

    def _can_make(self, found: object) -> bool:
        return callable(found)

    @property
    def _attribute(self) -> str:
        """The object's name in its module."""
        return self.name

    def _import(self) -> ModuleType:
        path = self.path()
        with users_code(f"{self.option} {self}", self.origin):
            if self.is_file and path:
                try:
                    return _import_file(path.absolute(), self.option)
                except ImportError as error:
                    if "no known parent package" not in str(error):
                        raise
                    parent, name = path.absolute().parent, f"{path.absolute().parent.name}.{path.stem}:{self.name}"
                    raise UserError(
                        f"{self.option} {self}: {path} has a relative import, which works in a package only: run in "
                        f"{parent.parent} with {self.option} {name}"
                    ) from None
            with _unmoved():
                return importlib.import_module(self.origin)


@dataclass(frozen=True)
class ModelSource(UserCode):
    """The network that `--model` names; `origin` is a file, a module or a library, and empty for a built-in one."""

    wanted: ClassVar[str] = "an nn.Module class, or a function that returns a module"

    @classmethod
    def parse(cls, text: str) -> "ModelSource":
        """Parse the value of `--model`.

        Raises:
            UserError: it has none of the known forms.
        """
        origin, _, name = text.rpartition(":")
        if not origin and text not in BUILT_IN:
            if Path(name).suffix == ".py":
                raise UserError(f"--model {name} lacks the name of a class or function: give --model {name}:NAME")
            raise UserError(unknown("network", name, BUILT_IN, FORMS))
        source = cls(origin, name)
        if origin in LIBRARIES and not re.fullmatch(r"[\w.]+", name):
            raise UserError(
                f"--model {short(text)}: {origin} has no network with this name; give a name such as resnet18"
            )
        if source.is_own and not (name.isidentifier() and (source.is_file or re.fullmatch(r"[\w.]+", origin))):
            raise UserError(f"--model {short(text)} has none of the known forms; give {FORMS}")
        return source

    @property
    def is_own(self) -> bool:
        """Whether it is the user's own code, which must be named again to use a checkpoint."""
        return is_own_code(str(self))

    def path(self) -> Path | None:
        """Return the file with the user's own code; None if there is none. Raises as `UserCode.path` does."""
        return super().path() if self.is_own and self.origin != "__main__" else None

    def digest(self) -> str | None:
        """Return the SHA-256 (hexadecimal) of that file."""
        path = self.path()
        return file_sha256(path) if path else None

    def load(self, image_shape: tuple[int, int, int], num_classes: int, arguments: str) -> Callable[[], "nn.Module"]:
        """Import the code; return a function that builds a new module, on torch's default device.

        Raises:
            UserError: the import fails, or the network does not accept the arguments; when called, the function raises
                it if the user's code fails or returns no module.
        """
        from torch import nn

        given = parse_arguments(arguments)
        if self.origin in LIBRARIES:
            make = self._load_of_library(image_shape[0], num_classes, given)
        else:
            factory = self.find()
            takes = self._check_arguments(factory, given)
            passed = {"image_shape": image_shape, "num_classes": num_classes}
            make = partial(_call, factory, passed, takes, given)

        def build() -> nn.Module:
            with users_code(f"--model {self}", self.origin):
                module = make()
            if not isinstance(module, nn.Module):
                raise UserError(f"--model {self} returns {kind_of(module)}, not a torch.nn.Module")
            return module

        return build

    def _load_of_library(self, channels: int, num_classes: int, given: dict[str, Any]) -> Callable[[], Any]:
        if refused := sorted(given.keys() & set(WEIGHTS)):
            raise UserError(f"--model-args {refused[0]}: to load weights of another network, give --init a file")
        if refused := sorted(given.keys() & set(SETTLED)):
            raise UserError(f"--model-args {refused[0]}: the run's images and settings determine this; omit it")
        make = partial(_LIBRARY_FACTORIES[self.origin](self.name, channels), num_classes=num_classes)

        def build() -> Any:
            try:
                return make(**given)
            except TypeError as error:
                about = re.search(r"(unexpected|multiple values).* argument '(\w+)'", str(error))
                if not about or about[2] not in given:
                    raise
                if about[1] != "unexpected":
                    raise UserError(f"--model-args {about[2]}: {self} sets this itself; omit it") from None
                valid = [name for name in inspect.signature(type(make())).parameters if name not in _SET_HERE]
                raise UserError(f"--model-args: {unknown(f'argument of {self}:', about[2], valid)}") from None

        return build

    def size_hint(self, module: "nn.Module", arguments: str, height: int, width: int) -> str:
        """Return a hint for the error of a network that may not accept images of this size."""
        if self.origin not in LIBRARIES:
            return ""
        takes = inspect.signature(type(module)).parameters.keys() & {"img_size", "image_size"}
        size = height if height == width else f"[{height},{width}]"
        hint = "".join(f": try --model-args {name}={size}" for name in takes - parse_arguments(arguments).keys())
        return f" (the images have {height}x{width} pixels{hint})"

    def _can_make(self, found: object) -> bool:
        from torch import nn

        return callable(found) and not isinstance(found, nn.Module)

    @property
    def _attribute(self) -> str:
        return self.name if self.origin else FAMILIES[self.name]

    def _import(self) -> ModuleType:
        return super()._import() if self.origin else importlib.import_module(f"dist_mnist.model.families.{self.name}")

    def _check_arguments(self, factory: Callable[..., Any], given: Mapping[str, object]) -> list[str] | None:
        """Check the names and types of given arguments; return the factory's parameter names; None: any."""
        try:
            parameters = inspect.signature(factory).parameters.values()
        except (TypeError, ValueError):
            return None
        for one in parameters:
            wanted = type(one.default)
            if one.name in given and wanted in (bool, int, float) and type(given[one.name]) not in _FITTING[wanted]:
                raise UserError(
                    f"--model-args {one.name}: expected {'true or false' if wanted is bool else 'a number'} (the "
                    f"default of {self} is {str(one.default).lower()}), got {short(json.dumps(given[one.name]))}"
                )
        if any(one.kind is one.VAR_KEYWORD for one in parameters):
            return None
        names = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        valid = [name for name in names if name not in PASSED]
        for name in given:
            if name not in valid:
                where = "" if valid else "it has none"
                raise UserError(f"--model-args: {unknown(f'argument of {self}:', name, valid, where)}")
        return names


def parse_arguments(text: str) -> dict[str, Any]:
    """Parse `width=32,act=gelu,widths=[16,32]`: numbers, true, false, null and lists as in JSON, else strings.

    Raises:
        UserError: a part is not NAME=VALUE, or a name is repeated.
    """
    found: dict[str, Any] = {}
    for part in filter(str.strip, _parts(text)):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier() or name in PASSED:
            raise UserError(
                f"--model-args {short(part)}: give NAME=VALUE, separated by commas, such as width=32,depth=3; "
                f"{' and '.join(PASSED)} come from the data"
            )
        if name in found:
            raise UserError(f"--model-args: {name} is given twice")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value.strip()
    return found


def _call(
    factory: Callable[..., Any], passed: Mapping[str, Any], takes: list[str] | None, given: Mapping[str, Any]
) -> Any:
    """Call a factory with the arguments it accepts; one with **kwargs may pass them to code that rejects some."""
    wanted = {name: value for name, value in passed.items() if takes is None or name in takes}
    while True:
        try:
            return factory(**wanted, **given)
        except TypeError as error:
            about = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if takes is not None or not about or about[1] not in wanted:
                raise
            del wanted[about[1]]


def _parts(text: str) -> Iterator[str]:
    """Split a text at commas outside brackets."""
    start, depth = 0, 0
    for index, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if character == "," and depth <= 0:
            yield text[start:index]
            start = index + 1
    yield text[start:]


def _import_file(path: Path, option: str) -> ModuleType:
    """Import a file as a fresh module that can import modules of its folder, as a script can.

    For `--model`, the folders of earlier files are removed from the import path first; listeners are imported
    in addition to a model.

    Raises:
        UserError: another module of this name is already imported.
    """
    folder, name = str(path.parent), path.stem
    for other in _neighbours.keys() - {folder} if option == "--model" else ():
        for neighbour in _neighbours.pop(other):
            sys.modules.pop(neighbour, None)
        with suppress(ValueError):
            sys.path.remove(other)
    if name in sys.modules and _file_of(name) != str(path):
        raise UserError(f"{option} {path}: its name conflicts with the imported module {name}; rename the file")
    if folder not in _neighbours:
        sys.path.insert(0, folder)
    neighbours = _neighbours.setdefault(folder, set())
    found = importlib.util.spec_from_file_location(name, path)
    assert found and found.loader
    before = set(sys.modules)
    what = f"{path} is imported for {option}"
    _being_imported.append(what)
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    try:
        with _unmoved():
            found.loader.exec_module(module)
    finally:
        _being_imported.remove(what)
        new = {one for one in sys.modules.keys() - before if _file_of(one).startswith(f"{folder}{os.sep}")}
        neighbours |= {one for one in new if "site-packages" not in _file_of(one)}
    return module


# Folders of the files that were imported last, and the modules that these imported from there.
_neighbours: dict[str, set[str]] = {}


_being_imported: list[str] = []


def check_not_importing() -> None:
    """Raise a UserError if this is called by user code during its import."""
    if _being_imported:
        raise UserError(
            f'{_being_imported[-1]}, and starts a training run itself: put that under `if __name__ == "__main__":`'
        )


def _file_of(module: str) -> str:
    return getattr(sys.modules.get(module), "__file__", None) or ""


@contextmanager
def _unmoved() -> Iterator[None]:
    """Restore the working directory and lost entries of sys.path after a `with` block of imports."""
    here, path = os.getcwd(), list(sys.path)
    try:
        yield
    finally:
        os.chdir(here)
        sys.path += [entry for entry in path if entry not in sys.path]


@contextmanager
def users_code(what: str, origin: str = "", hint: str = "") -> Iterator[None]:
    """Turn any exception of the user's code within a `with` block, also of `exit()`, into a UserError with its line.

    Out-of-memory errors and those about tensors on torch's meta device pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        if is_out_of_memory(error) or (isinstance(error, RuntimeError) and "meta tensor" in str(error)):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if origin and os.path.basename(frame.filename) == os.path.basename(origin)]
        where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
        text = _text_of(error)
        said = f": {short(text, 300)}" if text else ""
        raise UserError(f"{what} raised {type(error).__name__}{said}{where}{hint}") from None


def _text_of(error: BaseException) -> str:
    """Return an exception's message as one line."""
    try:
        return " ".join(str(error).split())
    except Exception:  # its __str__ raises
        return ""


def _is_factory(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _find_modules_here() -> None:
    """Make modules in the working directory importable, as `python -m` does."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())


def kind_of(value: object) -> str:
    """Return a value's type with its article: `a str`, `an int`."""
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def _torchvision(name: str, channels: int) -> Callable[..., Any]:
    with _installed("torchvision"):
        import torchvision

    if name not in (names := torchvision.models.list_models(module=torchvision.models)):
        raise UserError(unknown("network of torchvision:", name, names, "torchvision.models.list_models() lists them"))

    def make(**arguments: Any) -> "nn.Module":
        if name in AUXILIARY:
            arguments = {"aux_logits": False, "init_weights": True} | arguments
        return _with_channels(torchvision.models.get_model(name, weights=None, **arguments), channels)

    return make


def _timm(name: str, channels: int) -> Callable[..., Any]:
    with _installed("timm"):
        import timm

    if not timm.is_model(name):
        raise UserError(unknown("network of timm:", name, timm.list_models(), "timm.list_models() lists them"))
    return partial(timm.create_model, name, pretrained=False, in_chans=channels)


_LIBRARY_FACTORIES = {"torchvision": _torchvision, "timm": _timm}


@contextmanager
def _installed(library: str) -> Iterator[None]:
    import torch

    needs = f"--model {library}:NAME needs {library}, which cannot be imported here"
    try:
        yield
    except ModuleNotFoundError as error:
        raise NotInstalled(f"{needs} ({error}): pip install {library}") from None
    except Exception as error:  # such as an operator built for another version of torch
        said = short(" ".join(str(error).split()), 200)
        raise NotInstalled(
            f"{needs} ({type(error).__name__}: {said}): install the build of torchvision for torch "
            f"{torch.__version__}, from the package index that torch was installed from"
        ) from None


def _with_channels(module: "nn.Module", channels: int) -> "nn.Module":
    """Adapt a network for images of 3 channels to another number, with a new first convolution."""
    from torch import nn

    first = next((layer for layer in module.modules() if isinstance(layer, nn.Conv2d)), None)
    if first and first.in_channels != channels:
        first.in_channels = channels
        first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, channels, *first.kernel_size))
        first.reset_parameters()
    return module
