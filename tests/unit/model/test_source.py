"""What `--model` and `--model-args` name, and where a network comes from."""

import hashlib
import os
import sys

import pytest
from torch import nn

from dist_mnist.config.resolve import resolve
from dist_mnist.model.source import ModelSource, parse_arguments
from dist_mnist.utils.errors import UserError

FILE = """
from torch import nn
from neighbour import WIDTH

class Net(nn.Module):
    def __init__(self, image_shape, num_classes, width=WIDTH, act="relu"):
        super().__init__()
        self.shape, self.width, self.act = image_shape, width, act
        self.head = nn.Linear(width, num_classes)

def any_name(**given):
    module = nn.Linear(2, 3)
    module.given = given
    return module

def nothing():
    return nn.Linear(2, 3)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with networks of the user's own, which is the working directory; nothing of them stays imported."""
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "nets.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    for name in ("mine", "neighbour", "package", "package.nets"):
        sys.modules.pop(name, None)


def build(text: str, arguments: str = ""):
    return ModelSource.parse(text).load((1, 8, 8), 3, arguments)()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("resnt", "unknown network 'resnt', did you mean 'resnet'"),
        ("mine.py", "--model mine.py lacks the name of a class or function: give --model mine.py:NAME"),
        ("mine.py:", "has none of the known forms"),
        ("mine.py:Net()", "has none of the known forms"),
        ("a b:Net", "has none of the known forms"),
        ("torchvision:resnet18; import os", "torchvision has no network with this name"),
        ("timm:hf-hub:some/where", "has none of the known forms|timm has no network"),
        ("", "unknown network ''"),
        (":cnn", "unknown network 'cnn'|none of the known forms"),
    ],
)
def test_parse_of_another_form_is_refused(text, sentence):
    with pytest.raises(UserError, match=sentence):
        ModelSource.parse(text)


@pytest.mark.parametrize("text", ["cnn", "mlp", "resnet", "timm:resnet18", "mine.py:Net", "/a b/mine.py:Net", "a.b:C"])
def test_parse_is_written_as_it_was_given(text):
    source = ModelSource.parse(text)
    assert str(source) == text and source.is_own == text.endswith(("Net", "C"))


def test_build_of_a_file_passes_shape_classes_and_arguments(folder):
    net = build("mine.py:Net", "width=7,act=gelu")
    assert (net.shape, net.width, net.act, net.head.out_features) == ((1, 8, 8), 7, "gelu", 3)
    assert build("mine.py:Net").width == 5, "its neighbour is found, as for a script"
    assert build("mine.py:nothing").in_features == 2, "only what its signature takes is passed"
    given = build("mine.py:any_name", "a=1").given
    assert given == {"image_shape": (1, 8, 8), "num_classes": 3, "a": 1}


def test_build_of_a_module_in_the_working_directory(folder):
    assert build("package.nets:Net").head.out_features == 3
    with pytest.raises(UserError, match=r"there is no module package.other: install it, or run in the folder"):
        build("package.other:Net")
    with pytest.raises(UserError, match="there is no module no_such: "):
        build("no_such:Net")


@pytest.mark.parametrize(
    ("text", "arguments", "sentence"),
    [
        (
            "mine.py:Net",
            "widht=3",
            r"unknown argument of mine.py:Net: 'widht', did you mean 'width'\? .there are: width, ",
        ),
        ("mine.py:nothing", "width=3", r"unknown argument of mine.py:nothing: 'width' .it has none"),
        ("mine.py:Nett", "", r"unknown name in mine.py: 'Nett', did you mean 'Net'\?"),
        ("mine.py:FILE", "", "unknown name in mine.py: 'FILE'"),
        (
            "mine.py:Net",
            "width=none",
            '--model-args width: expected a number .the default of mine.py:Net is 5., got "none"',
        ),
        ("other.py:Net", "", "there is no file .*other.py"),
        ("mlp", "width=3", "unknown argument of mlp: 'width', did you mean 'widths'"),
        ("resnet", "image_shape=3", "give NAME=VALUE"),
    ],
)
def test_build_with_a_mistake_is_refused(folder, text, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        build(text, arguments)


@pytest.mark.parametrize(
    ("text", "arguments", "parameters"), [("resnet", "", 695_658), ("resnet", "width=8,depth=1", 19_714),
    ("mlp", "widths=[4]", 64 * 4 + 4 + 8 + 4 * 3 + 3)],
)  # fmt: skip
def test_build_of_a_family_has_its_size(text, arguments, parameters):
    shape, classes = ((1, 8, 8), 3) if text == "mlp" else ((1, 28, 28), 10)
    module = ModelSource.parse(text).load(shape, classes, arguments)()
    assert isinstance(module, nn.Module) and sum(p.numel() for p in module.parameters()) == parameters


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("width=32,depth=3", {"width": 32, "depth": 3}),
        ("lr = 1e-3 , act=gelu,bias=false,last=null", {"lr": 1e-3, "act": "gelu", "bias": False, "last": None}),
        ('widths=[16,32],name="a,b"', None),
        ("widths=[16,32],deep=true", {"widths": [16, 32], "deep": True}),
        ("stages=[[1,2],[3,[4]]],deep=true", {"stages": [[1, 2], [3, [4]]], "deep": True}),
    ],
)
def test_parse_arguments_gives_values(text, values):
    if values is None:
        with pytest.raises(UserError, match="give NAME=VALUE"):
            parse_arguments(text)
    else:
        assert parse_arguments(text) == values


@pytest.mark.parametrize("text", ["width", "=3", "a b=3", "num_classes=3", "a=1,a=2"])
def test_parse_arguments_of_another_form_is_refused(text):
    with pytest.raises(UserError, match="--model-args"):
        parse_arguments(text)


OF_KEYWORDS = """
from torch import nn

class Sized(nn.Module):
    def __init__(self, num_classes=10, bias=True, **kwargs):
        super().__init__(**kwargs)
        self.head = nn.Linear(4, num_classes, bias)

def sized(**kwargs):
    return Sized(**kwargs)

class WithoutInit(nn.Module):
    pass
"""


def test_build_of_a_factory_of_any_keywords_gives_it_what_it_takes(folder):
    (folder / "mine.py").write_text(OF_KEYWORDS)
    assert build("mine.py:sized").head.out_features == 3
    assert build("mine.py:Sized", "bias=false").head.bias is None
    assert isinstance(build("mine.py:WithoutInit"), nn.Module)
    with pytest.raises(UserError, match=r"raised TypeError: .*unexpected keyword argument 'depth'"):
        build("mine.py:sized", "depth=3")


@pytest.mark.parametrize("value", ["no", "1", "[]"])
def test_build_with_another_type_than_the_defaults_is_refused(folder, value):
    (folder / "mine.py").write_text(OF_KEYWORDS)
    with pytest.raises(
        UserError, match=r"--model-args bias: expected true or false \(the default of mine\.py:Sized is true"
    ):
        build("mine.py:Sized", f"bias={value}")


def test_build_of_a_file_with_relative_imports_names_the_module(folder):
    (folder / "package" / "nets.py").write_text("from .other import Net")
    with pytest.raises(UserError, match=r"has a relative import.*: run in .* with --model package\.nets:Net$"):
        build("package/nets.py:Net")


def test_build_of_a_file_that_trains_when_it_is_imported_is_refused(folder):
    (folder / "mine.py").write_text("import dist_mnist\ndist_mnist.train('mlp', data_dir='nowhere')\n" + FILE)
    with pytest.raises(
        UserError, match=r"mine\.py is imported for --model, and starts a training run itself: put that"
    ):
        build("mine.py:nothing")


def test_build_of_a_file_whose_name_hides_a_module_in_use_is_refused(folder):
    (folder / "torch.py").write_text(FILE)
    with pytest.raises(UserError, match="its name conflicts with the imported module torch; rename the file"):
        build("torch.py:nothing")


def test_build_of_a_file_that_moves_away_stays_in_the_folder(folder):
    (folder / "mine.py").write_text(FILE + "import os, sys\nos.chdir('/')\nsys.path.clear()\n")
    before = sys.path.copy()
    build("mine.py:nothing")
    assert os.getcwd() == str(folder) and set(before) <= set(sys.path)


@pytest.mark.parametrize(("model", "arguments"), [("resnet", "depth=3000000"), ("mlp", f"widths={[1] * 101}")])
def test_build_of_a_family_without_end_is_refused(model, arguments):
    with pytest.raises(UserError, match="the limit is 100"):
        build(model, arguments.replace(" ", ""))


def test_digest_is_that_of_the_file_and_needs_no_import(folder):
    (folder / "mine.py").write_text("raise SystemExit\n")
    expected = hashlib.sha256(b"raise SystemExit\n").hexdigest()
    assert ModelSource.parse("mine.py:Net").digest() == expected and "mine" not in sys.modules
    assert ModelSource.parse("package.nets:Net").digest() == hashlib.sha256(FILE.encode()).hexdigest()
    assert ModelSource.parse("cnn").digest() is None and ModelSource.parse("__main__:Net").digest() is None


def test_resolve_settings_of_the_cnn_for_another_network_are_refused():
    with pytest.raises(
        UserError, match=r"--dense-units applies to --model cnn only: .* of --model mlp by --model-args"
    ):
        resolve({"model": "mlp", "dense_units": (3,)})
    with pytest.raises(UserError, match="--model-args does not apply to --model cnn: use its own options"):
        resolve({"model_args": "width=3"})
    assert resolve({"model": "mlp", "recipe": "best"}).model == "mlp", "a recipe's do not stand in the way"


def test_resolve_resumes_own_network_from_another_file_but_not_another_name():
    started = resolve({"model": "mine.py:Net"})
    assert resolve({"model": "elsewhere/mine.py:Net"}, started).model == "elsewhere/mine.py:Net"
    with pytest.raises(UserError, match=r"model: mine.py:Net -> mine.py:Other"):
        resolve({"model": "mine.py:Other"}, started)


def test_digest_of_settings_that_are_as_before_is_that_of_earlier_versions():
    assert resolve({}).digest("data") == "4d6ba459"
    assert resolve({"model": "mlp"}).digest("data") != resolve({}).digest("data")
