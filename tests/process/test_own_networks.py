"""Whole runs with a network of the user's own: the same promises, whatever the module, and code from the user alone."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import dist_mnist as library
from dist_mnist.run.directory import RunDirectory
from dist_mnist.utils.errors import UserError
from helpers import HANGS_AFTER_S, networks
from helpers.runs import digest, dist_mnist, losses, train_here

OWN = networks.__file__
SETTINGS = ("--batch-size=60", "--log-every=1", "--lr=0.02", "--threads=1", "--precision=fp32", "--no-tensorboard")
KINDS = ["BatchNormDropout", "LayerNormed", "GroupNormed", "Attention", "TiedWeights", "OneParameter"]


def alone(data, run_dir, *options):
    """A run of one process, within this one; it has to succeed."""
    done = train_here(data, run_dir, *SETTINGS, *options)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> Path:
    """A finished run of a network of the user's own."""
    run_dir = tmp_path_factory.mktemp("own") / "run"
    alone(digits, run_dir, f"--model={OWN}:BatchNormDropout", "--model-args=width=6", "--epochs=1", "--ema-decay=0.9")
    return run_dir


@pytest.mark.quick
@pytest.mark.parametrize("name", KINDS)
def test_train_own_network_resumes_with_the_same_bits(digits, tmp_path, name):
    options = (f"--model={OWN}:{name}", "--schedule=constant", "--warmup-fraction=0", "--ema-decay=0.9")
    alone(digits, tmp_path / "whole", *options, "--steps=7")
    alone(digits, tmp_path / "parts", *options, "--steps=3")
    alone(digits, tmp_path / "parts", "--model", f"{OWN}:{name}", "--steps=7")
    assert digest(RunDirectory(tmp_path / "parts")) == digest(RunDirectory(tmp_path / "whole"))


@pytest.mark.parametrize("name", KINDS)
def test_train_own_network_on_three_processes_has_the_losses_of_one(train, digits, tmp_path, name):
    options = (*SETTINGS, f"--model={OWN}:{name}", "--steps=10")  # the ninth batch has 60 images, the last of an epoch
    train(3, tmp_path / "three", *options)
    alone(digits, tmp_path / "one", f"--model={OWN}:{name}", "--steps=10")
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)


@pytest.mark.parametrize("name", ["BatchNormDropout", "TiedWeights"])
def test_train_own_network_invariant_has_the_same_bits_on_any_number_of_processes(train, digits, tmp_path, name):
    options = (f"--model={OWN}:{name}", "--steps=6", "--invariant")
    alone(digits, tmp_path / "1", *options)
    for count in (2, 4):
        train(count, tmp_path / str(count), *SETTINGS, *options)
    assert len({digest(RunDirectory(tmp_path / name)) for name in ("1", "2", "4")}) == 1


def test_train_of_a_run_with_own_network_asks_for_its_code(digits, trained):
    done = train_here(digits, trained, *SETTINGS)
    assert done.returncode == 2 and f"never loaded from a run: name it again, such as --model {OWN}:" in done.stderr


@pytest.mark.parametrize("command", ["eval", "predict", "export"])
def test_command_with_own_network_asks_for_its_code(digits, trained, tmp_path, command):
    words = {
        "eval": ("eval", "--ckpt", trained),
        "predict": ("predict", digits / "t10k-images-idx3-ubyte", "--ckpt", trained),
        "export": ("export", "--ckpt", trained, "--format=safetensors", "--output", tmp_path / "x"),
    }[command]  # fmt: skip
    done = dist_mnist(*words)
    assert done.returncode == 2 and f"say where it is, such as --model {OWN}:BatchNormDropout" in done.stderr
    done = dist_mnist(*words, "--model", f"{OWN}:BatchNormDropout")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("format", ["safetensors", "onnx", "torch-export"])
def test_export_own_network_in_any_format(trained, tmp_path, format):
    done = dist_mnist(
        "export", "--ckpt", trained, f"--format={format}", "--output", tmp_path / "x", "--json",
        f"--model={OWN}:BatchNormDropout",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["largest_difference"] < 1e-4


def test_export_tied_weights_as_safetensors(digits, tmp_path):
    alone(digits, tmp_path / "run", f"--model={OWN}:TiedWeights", "--steps=2")
    words = ("export", "--ckpt", tmp_path / "run", "--format=safetensors", "--output", tmp_path / "x")
    done = dist_mnist(*words, f"--model={OWN}:TiedWeights")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_train_built_in_network_that_does_not_suit_a_crop_is_a_sentence(digits, tmp_path, model):
    done = train_here(digits, tmp_path / "run", *SETTINGS, f"--model={model}", "--crop=4", "--steps=2")
    expected = 2 if model == "mlp" else 0  # its head takes the mean over whatever is left
    assert done.returncode == expected and "Traceback" not in done.stderr
    assert (tmp_path / "run").exists() == (expected == 0)


def test_train_network_of_volumes_runs_without_channels_last(digits, tmp_path):
    file = tmp_path / "volumes.py"
    file.write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 2, (1, 3, 3)), nn.Flatten(),"
        " nn.Linear(1352, 10))\n"
    )
    alone(digits, tmp_path / "run", f"--model={file}:net", "--steps=2")


def test_compare_and_report_with_own_network_are_given_its_code(trained, tmp_path):
    [comparison] = [json.loads(dist_mnist("compare", trained, trained, "--json").stdout)["contest"]]
    assert "--model" in comparison["impossible"]
    given = ("--model", f"{OWN}:BatchNormDropout")
    assert json.loads(dist_mnist("compare", trained, trained, "--json", *given).stdout)["contest"]["p_value"] == 1
    assert dist_mnist("report", trained, "--output", tmp_path / "page.html", *given).returncode == 0


def test_eval_own_network_that_has_changed_is_a_warning_or_an_error(digits, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n")
    alone(digits, tmp_path / "run", f"--model={file}:net", "--steps=2")
    command = ("eval", "--ckpt", tmp_path / "run", "--json", f"--model={file}:net")
    before = dist_mnist(*command)
    assert (before.returncode, before.stderr) == (0, "")
    file.write_text(file.read_text() + "# a remark\n")
    after = dist_mnist(*command)
    assert after.stdout == before.stdout
    assert re.search("warning: --model .*mine.py:net has changed since .* was saved", after.stderr)
    assert "has changed since the run in" in alone(digits, tmp_path / "run", f"--model={file}:net").stderr
    file.write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(784, 10, False))\n")
    other = dist_mnist(*command)
    assert other.returncode == 2 and "its weights do not match its settings: module.1.bias" in other.stderr
    resumed = train_here(digits, tmp_path / "run", f"--model={file}:net", "--steps=2", "--epochs=1")
    assert resumed.returncode == 2


def test_train_names_what_is_not_exact_and_invariant_refuses_it(digits, tmp_path):
    file = tmp_path / "noisy.py"
    file.write_text(
        "from torch import nn\nfrom torch.nn import functional as F\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.head = nn.Linear(784, 10)\n"
        "    def forward(self, x):\n        return self.head(F.dropout(x.flatten(1), 0.1, self.training))\n"
    )
    done = alone(digits, tmp_path / "run", f"--model={file}:Net", "--steps=2")
    assert re.search(
        "warning: --model .*: Net draws from torch's random number generator .*; results depend", done.stderr
    )
    done = train_here(digits, tmp_path / "other", f"--model={file}:Net", "--steps=2", "--invariant")
    assert done.returncode == 2 and not (tmp_path / "other").exists()
    assert re.search("--invariant needs an exact network; --model .*: Net draws", done.stderr)


HOSTILE = {
    "raises at import": ("x = 1 / 0", r"raised ZeroDivisionError: division by zero \(.*hostile.py, line 1\)"),
    "ends the process": ("import sys; sys.exit(5)", r"raised SystemExit: 5 \(.*hostile.py, line 1\)"),
    "is no Python": ("class Net(:", "raised SyntaxError: "),
    "needs what is not there": ("import no_such_package", "raised ModuleNotFoundError: No module named 'no_such"),
    "has no such name": ("class Other: pass", "unknown name in .*hostile.py: 'Net' .there are: Other"),
    "is a module object": ("from torch import nn; Net = nn.Linear(2, 3)", "is a Linear: name an nn.Module class"),
    "gives none": ("def Net(): return 'net'", "returns a str, not a torch.nn.Module"),
    "raises when made": ("def Net(): raise OSError('no')", r"raised OSError: no \(.*hostile.py, line 1\)"),
    "takes all memory": (
        "from torch import nn\ndef Net(): return nn.Linear(10**7, 10**7)", "error: out of memory .*allocate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_train_hostile_network_is_a_sentence_and_leaves_no_run(digits, tmp_path, name):
    content, sentence = HOSTILE[name]
    (tmp_path / "hostile.py").write_text(content + "\n")
    done = train_here(digits, tmp_path / "run", f"--model={tmp_path}/hostile.py:Net", "--steps=2")
    assert done.returncode == (1 if "memory" in name else 2), done.stderr
    assert re.search(sentence, done.stderr) and "Traceback" not in done.stderr
    assert done.stdout == "" and not (tmp_path / "run").exists()


def test_train_network_that_prints_and_starts_threads_is_trained(digits, tmp_path):
    file, before = tmp_path / "loud.py", threading.active_count()
    file.write_text(
        "import threading\nfrom torch import nn\nprint('loading')\n"
        "def Net():\n"
        "    threading.Thread(target=threading.Event().wait, args=(30,), daemon=True).start()\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
    )
    done = alone(digits, tmp_path / "run", f"--model={file}:Net", "--steps=2")
    assert done.stdout.startswith("loading\n") and "it starts 1 thread;" in done.stderr
    assert threading.active_count() > before


@pytest.mark.quick
@pytest.mark.parametrize("before", [(), ("nohup",)], ids=["in a terminal", "under nohup"])
def test_agent_leaves_no_run_directory_of_a_network_that_fails(digits, tmp_path, before):
    """Under nohup SIGHUP is ignored, which torchrun uses to end a rank that waits for its end."""
    (tmp_path / "hostile.py").write_text("import os; raise RuntimeError('not today')\n")
    options = ("--nproc=2", "--model=hostile.py:Net", f"--data-dir={digits}", "--run-dir=run")
    command = [*before, sys.executable, "-m", "dist_mnist", "train", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert re.search(r"error: --model hostile.py:Net raised RuntimeError: not today \(.*line 1\)", done.stderr)
    assert not (tmp_path / "run").exists()


SCRIPT = """
import sys
import torch
from torch import nn
from dist_mnist import train

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.head = nn.Linear(784, 10)

    def forward(self, x):
        return self.head(self.norm(x).view(len(x), -1))

torch.manual_seed(1)
found = train(Net(), data_dir=sys.argv[1], run_dir=sys.argv[2], steps=6, batch_size=60, device="cpu",
              precision="fp32", log_every=1, tensorboard=False, threads=1)
if found:
    print("tested", found.result.images)
"""


def test_library_trains_a_module_object_as_the_command_does(digits, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    alone_command = [sys.executable, "script.py", digits, "one"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    for command in (alone_command, [*torchrun, "script.py", digits, "three"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("tested 200") == 1
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)
    config = json.loads((tmp_path / "one/config.json").read_text())
    assert config["settings"]["model"].endswith("script.py:Net") and len(config["code_sha256"]) == 64


def test_library_gives_the_module_its_weights_and_says_what_it_takes(digits, tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    before = module[1].weight.clone()
    options = {"batch_size": 60, "device": "cpu", "steps": 3, "tensorboard": False, "threads": 1}
    found = library.train(module, data_dir=digits, run_dir=tmp_path / "run", **options)
    assert found and found.result and found.result.images == 200
    assert not module[1].weight.equal(before) and torch.isfinite(module[1].weight).all()
    with pytest.raises(UserError, match=r"model is a type; give a torch.nn.Module, or a name"):
        library.train(nn.Linear, data_dir=digits)
    with pytest.raises(UserError, match="model_args has no effect on a module"):
        library.train(module, data_dir=digits, model_args="width=3")
    assert callable(library.train) and __import__("dist_mnist.train").train is library.train


def test_library_leaves_a_module_its_layers_and_what_is_trained(digits, tmp_path):
    module = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(784, 10))
    options = {"batch_size": 60, "device": "cpu", "steps": 2, "tensorboard": False, "threads": 1, "freeze": "0.*"}
    library.train(module, data_dir=digits, run_dir=tmp_path / "run", **options)
    assert [type(layer) for layer in module] == [nn.BatchNorm2d, nn.Flatten, nn.Dropout, nn.Linear]
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert "timer" not in vars(module[0])
    module.train()(torch.randn(4, 1, 28, 28)).sum().backward()  # a loop of one's own goes on with it
    assert int(module[0].num_batches_tracked) == 1


TWICE = """
import sys
from torch import nn
from dist_mnist import train
for run_dir in sys.argv[2:]:
    train(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), data_dir=sys.argv[1], run_dir=run_dir, batch_size=60,
          steps=2, device="cpu", tensorboard=False, threads=1, init=None if run_dir == "first" else "first")
"""


def test_library_trains_twice_in_the_same_processes(digits, tmp_path):
    (tmp_path / "script.py").write_text("import torch\ntorch.manual_seed(0)\n" + TWICE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
    done = subprocess.run(
        [*torchrun, digits, "first", "second"], capture_output=True, text=True, timeout=HANGS_AFTER_S, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / name / "result.json").is_file() for name in ("first", "second"))


MIXTURE = """
import torch
from torch import nn

class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(784, 2), nn.ModuleList(nn.Linear(784, 10) for _ in range(2))

    def forward(self, x):
        x = x.flatten(1)
        weights = self.gate(x).softmax(1)
        if float(weights.sum()) > 0:  # which a compiler cannot know
            return sum(weights[:, i, None] * expert(x) for i, expert in enumerate(self.experts))
"""


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_export_of_a_network_that_cannot_be_compiled_is_a_sentence(digits, tmp_path, format):
    (tmp_path / "mixture.py").write_text(MIXTURE)
    model = f"{tmp_path / 'mixture.py'}:Mixture"
    alone(digits, tmp_path / "run", f"--model={model}", "--steps=1")
    words = ("export", "--ckpt", tmp_path / "run", "--model", model, "--format", format, "--output", tmp_path / "x")
    done = dist_mnist(*words)
    assert done.returncode == 2 and f"this network cannot be exported as {format}" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "x").exists()


@pytest.mark.quick
def test_dry_run_and_doctor_try_the_network(digits, tmp_path):
    (tmp_path / "mine.py").write_text("from torch import nn\ndef net():\n    return nn.Flatten()")
    options = (f"--data-dir={digits}", f"--model={tmp_path / 'mine.py'}:net", "--device=cpu")
    done = dist_mnist("train", "--dry-run", *options, f"--run-dir={tmp_path / 'run'}")
    assert done.returncode == 2 and "has no parameters to train" in done.stderr and not (tmp_path / "run").exists()
    done = dist_mnist("doctor", *options)
    assert done.returncode != 0 and "has no parameters to train" in done.stdout + done.stderr


RARELY = """
from torch import nn

class Rarely(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.other = nn.Linear(784, 10), nn.Linear(784, 10)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(x) + self.other(x) if len(x) < 60 else self.head(x)
"""


def test_train_network_that_leaves_out_a_parameter_in_a_step_is_a_sentence(digits, tmp_path):
    (tmp_path / "rarely.py").write_text(RARELY)
    done = train_here(digits, tmp_path / "run", *SETTINGS, f"--model={tmp_path / 'rarely.py'}:Rarely", "--steps=3")
    assert done.returncode == 2
    assert "the logits of this batch do not depend on other.weight, other.bias, unlike those of" in done.stderr


def test_compare_networks_of_two_folders_with_modules_of_the_same_name(digits, tmp_path):
    for name, units in (("one", 5), ("other", 7)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "sizes.py").write_text(f"UNITS = {units}")
        (folder / f"net_{name}.py").write_text(
            "from sizes import UNITS\nfrom torch import nn\n"
            f"def {name}():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, UNITS), nn.Linear(UNITS, 10))"
        )
    models = [f"{tmp_path / name / f'net_{name}.py'}:{name}" for name in ("one", "other")]
    for model, run_dir in zip(models, ("a", "b"), strict=True):
        alone(digits, tmp_path / run_dir, f"--model={model}", "--steps=2")
    options = [f"--model={model}" for model in models]
    done = dist_mnist("compare", tmp_path / "a", tmp_path / "b", "--json", *options)
    assert done.returncode == 0, done.stderr
    again = dist_mnist("compare", tmp_path / "b", tmp_path / "a", "--json", *options)
    assert again.returncode == 0, again.stderr


ELSEWHERE = """
import os, sys
os.chdir(f"node-{os.environ['RANK']}")
sys.argv[0] = "train"
import runpy
runpy.run_module("dist_mnist.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.quick
def test_train_ranks_that_see_other_code_are_named(digits, tmp_path):
    (tmp_path / "start.py").write_text(ELSEWHERE)
    for rank in (0, 1):
        (tmp_path / f"node-{rank}").mkdir()
        (tmp_path / f"node-{rank}/mine.py").write_text(Path(OWN).read_text() + f"# {rank}\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "start.py"]
    options = [f"--data-dir={digits}", f"--run-dir={tmp_path / 'run'}", "--model=mine.py:OneParameter", "--steps=2"]
    done = subprocess.run(
        [*torchrun, *options, "--device=cpu"], capture_output=True, text=True, timeout=HANGS_AFTER_S, cwd=tmp_path
    )
    assert done.returncode != 0
    assert re.search("error: rank 1 and rank 0 differ in their network: source [0-9a-f]{64} and source", done.stderr)
