"""Where a network comes from: a family of this package, a library of networks, or code of the user's own.

Code is imported only for a name on the command line, in a settings file or from the calling program; never because a
run directory, a checkpoint or a data folder names it. Nothing here needs torch before a network is made.
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

FAMILIES = {"mlp": "MLP", "resnet": "ResNet"}  # beside the CNN, which has settings of its own
BUILT_IN = ("cnn", *FAMILIES)
# Arguments of libraries by which weights are downloaded or unpickled.
WEIGHTS = ("pretrained", "weights", "weights_backbone", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
FORMS = "cnn, mlp, resnet, torchvision:NAME, timm:NAME, or code of your own as FILE.py:NAME or package.module:NAME"
PASSED = ("image_shape", "num_classes")
SETTLED = ("in_chans", "device", "dtype")  # of arguments of libraries, what a run's images and settings say
_NUMBER = (int, float, NoneType)
_FITTING: dict[type, tuple[type, ...]] = {bool: (bool, NoneType), int: _NUMBER, float: _NUMBER}  # of a default's type
_SET_HERE = (*PASSED, *SETTLED, *WEIGHTS)
# Of torchvision, networks that in training give the logits of further heads beside their own.
AUXILIARY = ("googlenet", "inception_v3")


class NotInstalled(UserError):
    """A library of networks is not here, or cannot be imported."""


@dataclass(frozen=True)
class UserCode:
    """Code of the user's own, which `option` names: in the file `origin`, or in a module of that name."""

    origin: str
    name: str
    option: str = "--model"
    wanted: ClassVar[str] = "a class, or a function that makes an instance"

    @classmethod
    def of(cls, text: str, option: str) -> "UserCode":
        """What `text`, such as FILE.py:NAME, names."""
        origin, _, name = text.rpartition(":")
        return cls(origin, name, option)

    def __str__(self) -> str:
        return f"{self.origin}:{self.name}" if self.origin else self.name

    @property
    def is_file(self) -> bool:
        """Whether it stands in a file that is no installed module."""
        return self.origin.endswith(".py")

    def check_file(self) -> None:
        """Raise a UserError if it should stand in a file and there is none; nothing is imported."""
        if self.is_file and not Path(self.origin).is_file():
            raise UserError(f"{self.option} {self}: there is no file {Path(self.origin).absolute()}")

    def path(self) -> Path | None:
        """The file of the code; None for what has none.

        Raises:
            UserError: there is no such file or module.
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
                f"{self.option} {self}: there is no module {self.origin}; is it installed, or in this folder?"
            )
        return Path(found.origin) if found.has_location and found.origin else None

    def find(self) -> Callable[..., Any]:
        """Import the code, and give the class or function of that name.

        Raises:
            UserError: it cannot be imported, or there is nothing of that name that can be called.
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
        """Its name in its module."""
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
                        f"{self.option} {self}: {path} imports relative to its folder, as only a module can: from "
                        f"{parent.parent}, give {self.option} {name}"
                    ) from None
            with _unmoved():
                return importlib.import_module(self.origin)


@dataclass(frozen=True)
class ModelSource(UserCode):
    """What `--model` names. `origin` is a file, a module or a library; empty for what is built in."""

    wanted: ClassVar[str] = "an nn.Module class, or a function that returns a module"

    @classmethod
    def parse(cls, text: str) -> "ModelSource":
        """What `text` names.

        Raises:
            UserError: it is of no such form.
        """
        origin, _, name = text.rpartition(":")
        if not origin and text not in BUILT_IN:
            if Path(name).suffix == ".py":
                raise UserError(f"--model {name} lacks the name of the class or function in it: --model {name}:NAME")
            raise UserError(unknown("network", name, BUILT_IN, FORMS))
        source = cls(origin, name)
        if origin in LIBRARIES and not re.fullmatch(r"[\w.]+", name):
            raise UserError(
                f"--model {short(text)}: {origin} has no network of that name; give a name such as resnet18"
            )
        if source.is_own and not (name.isidentifier() and (source.is_file or re.fullmatch(r"[\w.]+", origin))):
            raise UserError(f"--model {short(text)} is of no known form; give {FORMS}")
        return source

    @property
    def is_own(self) -> bool:
        """Whether it is the user's own code, which has to be named again by whoever uses a checkpoint."""
        return is_own_code(str(self))

    def path(self) -> Path | None:
        """The file with the user's own code; None for what is not such, or has none. Errors as of `UserCode.path`."""
        return super().path() if self.is_own and self.origin != "__main__" else None

    def digest(self) -> str | None:
        """The SHA-256 (hexadecimal) of that file."""
        path = self.path()
        return file_sha256(path) if path else None

    def load(self, image_shape: tuple[int, int, int], num_classes: int, arguments: str) -> Callable[[], "nn.Module"]:
        """Import the code. What is returned makes a new module, on torch's default device.

        Raises:
            UserError: it cannot be imported, or does not take the arguments; later, it raises something, or gives no
                module.
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
                raise UserError(f"--model {self} gives {kind_of(module)}, not a torch.nn.Module")
            return module

        return build

    def _load_of_library(self, channels: int, num_classes: int, given: dict[str, Any]) -> Callable[[], Any]:
        if refused := sorted(given.keys() & set(WEIGHTS)):
            raise UserError(f"--model-args {refused[0]}: weights of another network come in by --init, as a file")
        if refused := sorted(given.keys() & set(SETTLED)):
            raise UserError(f"--model-args {refused[0]}: a run's images and settings say that; leave it out")
        make = partial(_LIBRARY_FACTORIES[self.origin](self.name, channels), num_classes=num_classes)

        def build() -> Any:
            try:
                return make(**given)
            except TypeError as error:
                about = re.search(r"(unexpected|multiple values).* argument '(\w+)'", str(error))
                if not about or about[2] not in given:
                    raise
                if about[1] != "unexpected":
                    raise UserError(f"--model-args {about[2]}: {self} sets that itself; leave it out") from None
                valid = [name for name in inspect.signature(type(make())).parameters if name not in _SET_HERE]
                raise UserError(f"--model-args: {unknown(f'argument of {self}:', about[2], valid)}") from None

        return build

    def size_hint(self, module: "nn.Module", arguments: str, height: int, width: int) -> str:
        """What to say beside the error of a network that may not take images of this size."""
        if self.origin not in LIBRARIES:
            return ""
        takes = inspect.signature(type(module)).parameters.keys() & {"img_size", "image_size"}
        size = height if height == width else f"[{height},{width}]"
        hint = "".join(f": try --model-args {name}={size}" for name in takes - parse_arguments(arguments).keys())
        return f" (images here have {height}x{width} pixels{hint})"

    def _can_make(self, found: object) -> bool:
        from torch import nn

        return callable(found) and not isinstance(found, nn.Module)

    @property
    def _attribute(self) -> str:
        return self.name if self.origin else FAMILIES[self.name]

    def _import(self) -> ModuleType:
        return super()._import() if self.origin else importlib.import_module(f"dist_mnist.model.families.{self.name}")

    def _check_arguments(self, factory: Callable[..., Any], given: Mapping[str, object]) -> list[str] | None:
        """The names of its parameters, which all that are given must be; None if it takes any name."""
        try:
            parameters = inspect.signature(factory).parameters.values()
        except (TypeError, ValueError):
            return None
        for one in parameters:
            wanted = type(one.default)
            if one.name in given and wanted in (bool, int, float) and type(given[one.name]) not in _FITTING[wanted]:
                raise UserError(
                    f"--model-args {one.name}: {self} has {str(one.default).lower()} as its default; give "
                    f"{'true or false' if wanted is bool else 'a number'}, not {short(json.dumps(given[one.name]))}"
                )
        if any(one.kind is one.VAR_KEYWORD for one in parameters):
            return None
        names = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        valid = [name for name in names if name not in PASSED]
        for name in given:
            if name not in valid:
                where = "" if valid else "it takes none"
                raise UserError(f"--model-args: {unknown(f'argument of {self}:', name, valid, where)}")
        return names


def parse_arguments(text: str) -> dict[str, Any]:
    """The values in `width=32,act=gelu,widths=[16,32]`: numbers, true, false, null and lists as in JSON, else strings.

    Raises:
        UserError: a part is not NAME=VALUE, or a name is there twice.
    """
    found: dict[str, Any] = {}
    for part in filter(str.strip, _parts(text)):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier() or name in PASSED:
            raise UserError(
                f"--model-args {short(part)}: give NAME=VALUE, several with commas, such as width=32,depth=3; "
                f"{' and '.join(PASSED)} are as the data are"
            )
        if name in found:
            raise UserError(f"--model-args: {name} is there twice")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value.strip()
    return found


def _call(
    factory: Callable[..., Any], passed: Mapping[str, Any], takes: list[str] | None, given: Mapping[str, Any]
) -> Any:
    """Call a factory with what it takes; one of any keywords may give them to something that does not take them."""
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
    """What stands between the commas that are in no brackets."""
    start, depth = 0, 0
    for index, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if character == "," and depth <= 0:
            yield text[start:index]
            start = index + 1
    yield text[start:]


def _import_file(path: Path, option: str) -> ModuleType:
    """The module in a file, run anew; its neighbours can be imported as a script's.

    Those of files before cannot any more, once it is for `--model`; listeners are imported beside a model.

    Raises:
        UserError: a module of that name is in use by others.
    """
    folder, name = str(path.parent), path.stem
    for other in _neighbours.keys() - {folder} if option == "--model" else ():
        for neighbour in _neighbours.pop(other):
            sys.modules.pop(neighbour, None)
        with suppress(ValueError):
            sys.path.remove(other)
    if name in sys.modules and _file_of(name) != str(path):
        raise UserError(f"{option} {path}: its name hides the module {name}, which is in use; give it another name")
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


# The folders of the files that were imported last, and the modules that these found there.
_neighbours: dict[str, set[str]] = {}


_being_imported: list[str] = []


def check_not_importing() -> None:
    """Raise a UserError if a file of the user's code is just being imported, and it calls this."""
    if _being_imported:
        raise UserError(
            f'{_being_imported[-1]}, and starts a training of its own: put that under `if __name__ == "__main__":`'
        )


def _file_of(module: str) -> str:
    return getattr(sys.modules.get(module), "__file__", None) or ""


@contextmanager
def _unmoved() -> Iterator[None]:
    """Stay in this folder, and find what could be imported before, whatever an import in a `with` block does."""
    here, path = os.getcwd(), list(sys.path)
    try:
        yield
    finally:
        os.chdir(here)
        sys.path += [entry for entry in path if entry not in sys.path]


@contextmanager
def users_code(what: str, origin: str = "", hint: str = "") -> Iterator[None]:
    """Turn whatever the user's code raises within a `with` block, also `exit()`, into a sentence that says where.

    Want of memory stays what it is, and so does want of numbers on torch's meta device.
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
    """What an exception says, in one line."""
    try:
        return " ".join(str(error).split())
    except Exception:  # of its own __str__
        return ""


def _is_factory(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _find_modules_here() -> None:
    """Modules in the working directory are found, as by `python -m`."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())


def kind_of(value: object) -> str:
    """What a value is, in words: `a str`, `an int`."""
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
    except Exception as error:  # such as an operator that was built for another torch
        said = short(" ".join(str(error).split()), 200)
        raise NotInstalled(
            f"{needs} ({type(error).__name__}: {said}): install the build of torchvision that goes with "
            f"torch {torch.__version__}, from the index that torch is from"
        ) from None


def _with_channels(module: "nn.Module", channels: int) -> "nn.Module":
    """A network for images of 3 channels, its first convolution made anew for another number."""
    from torch import nn

    first = next((layer for layer in module.modules() if isinstance(layer, nn.Conv2d)), None)
    if first and first.in_channels != channels:
        first.in_channels = channels
        first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, channels, *first.kernel_size))
        first.reset_parameters()
    return module
