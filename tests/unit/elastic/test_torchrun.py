"""What a launcher has told this process, and how many processes a node starts; a torch that sees GPUs is a stand-in."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from dist_mnist.distributed.world import World
from dist_mnist.elastic import torchrun
from dist_mnist.elastic.rendezvous import Nodes
from dist_mnist.elastic.torchrun import become_rank, check_is_single, launched, num_processes
from dist_mnist.utils.errors import UserError

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
}  # fmt: skip
LAUNCHERS = {"mpirun": OPEN_MPI, "mpiexec": HYDRA, "srun": SRUN}
MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
UUIDS = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-1e5f"
MIGS = "MIG-8932f937-d72c-4106-c12f-20bd9faed9f6,MIG-GPU-1e5f/1/0"


@pytest.fixture(autouse=True)
def environ(monkeypatch) -> dict[str, str]:
    """An environment of this test's own, without a launcher's variables."""
    own = {"PATH": "/bin"}
    monkeypatch.setattr("os.environ", own)
    return own


@pytest.fixture
def gpus(monkeypatch) -> Callable[[int], None]:
    """A function that lets torch see so many GPUs, behind a driver."""

    def see(count: int) -> None:
        monkeypatch.setattr(torchrun, "_may_have_gpus", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_become_rank_takes_the_launchers_numbers(environ, launcher):
    environ |= LAUNCHERS[launcher] | MEETING
    assert launched().launcher == launcher
    become_rank()
    world = World.from_environment()
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 4, 1, 2)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_become_rank_without_an_address_says_what_to_set(environ, launcher):
    environ |= LAUNCHERS[launcher]
    with pytest.raises(UserError, match=f"{launcher} started 4 processes .* set MASTER_ADDR to .* MASTER_PORT"):
        become_rank()
    assert environ["LOCAL_RANK"] == "1", "so that one of a node's ranks speaks for all"


def test_become_rank_leaves_a_rank_of_torchruns_as_it_is(environ):
    environ |= SRUN | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    before = dict(environ)
    become_rank()
    assert environ == before and launched().launcher == "torchrun"


@pytest.mark.parametrize(("odd", "why"), [
    (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "first"}, "OMPI_COMM_WORLD_RANK is a launcher's whole number, not 'first'"),
    (HYDRA | {"PMI_SIZE": "4.0"}, "PMI_SIZE is a launcher's whole number, not '4.0'"),
    (HYDRA | {"MPI_LOCALNRANKS": "0"}, "LOCAL_WORLD_SIZE 0 contradict each other"),
    (SRUN | {"SLURM_NODEID": "7"}, r"SLURM_STEP_TASKS_PER_NODE is '2\(x2\)', which has no entry for SLURM_NODEID 7"),
    (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x"}, r"'2\(x', which has no entry for SLURM_NODEID 1"),
    (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE is 'two'"),
    ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is a launcher's whole number, not 'two'"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is a launcher's whole number, not '-1'"),
    ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK 5, WORLD_SIZE 2"),
    ({"RANK": "", "WORLD_SIZE": ""}, None),
    ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is a launcher's whole number, not 'many'"),
], ids=str)  # fmt: skip
def test_launchers_numbers_that_are_none_are_a_sentence(environ, odd, why):
    environ |= odd | MEETING
    with pytest.raises(UserError, match=why) if why else nullcontext():
        become_rank()
        assert World.from_environment().local_size >= 1


def test_slurms_count_of_gpus_that_is_no_number_is_a_sentence(environ):
    environ["SLURM_GPUS_ON_NODE"] = "gpu:2"
    with pytest.raises(UserError, match="SLURM_GPUS_ON_NODE is a launcher's whole number, not 'gpu:2'"):
        num_processes("auto")


@pytest.mark.parametrize("alone", [{}, {"OMPI_COMM_WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_process_that_is_the_only_one_is_no_rank(environ, alone):
    environ |= (SRUN | OPEN_MPI | alone) if alone else {}
    if "OMPI_COMM_WORLD_SIZE" in alone:
        environ["SLURM_STEP_NUM_TASKS"] = "1"
    elif alone:
        environ["OMPI_COMM_WORLD_SIZE"] = "1"
    assert launched() is None
    become_rank()
    assert "RANK" not in environ


@pytest.mark.parametrize(("node", "expected"), [(0, 3), (1, 3), (2, 1)])
def test_launched_by_srun_reads_the_tasks_of_its_node(environ, node, expected):
    environ |= SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "SLURM_NODEID": str(node)}
    assert launched().local_size == expected


def test_check_is_single_refuses_several_that_would_not_meet(environ):
    check_is_single(Nodes("1"))
    environ |= OPEN_MPI
    check_is_single(Nodes("2", "node1:29400"))
    with pytest.raises(UserError, match="mpirun started 4 processes"):
        check_is_single(Nodes("1"))


@pytest.mark.parametrize(("wanted", "expected"), [("auto", 1), ("0", 1), ("3", 3), ("cpu", 5)])
def test_num_processes_on_a_cpu(monkeypatch, wanted, expected):
    monkeypatch.setattr(torchrun, "num_cores", lambda: 5)
    assert num_processes("cpu", wanted) == expected


@pytest.mark.parametrize(("wanted", "expected"), [("auto", 4), ("0", 4), ("gpu", 4), ("2", 2)])
def test_num_processes_on_gpus(gpus, wanted, expected):
    gpus(4)
    assert num_processes("auto", wanted) == expected


@pytest.mark.parametrize("wanted", ["-1", "two", "1.5", "", "xpu", "٣"])
def test_num_processes_of_something_else_says_what_it_takes(wanted):
    with pytest.raises(UserError, match="--nproc expects a number of processes, auto, gpu or cpu"):
        num_processes("cpu", wanted)


def test_num_processes_one_per_gpu_where_there_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(torchrun, "_may_have_gpus", lambda: False)
    with pytest.raises(UserError, match="this machine has no usable GPU"):
        num_processes("auto", "gpu")


@pytest.mark.parametrize(
    ("chosen", "count", "says"),
    [
        ("0,1", 2, ""),
        (UUIDS, 2, ""),
        (MIGS, 1, "names 2 devices; this run uses 1: a process can use only one MIG instance"),
        ("0,1,7", 2, "names 3 devices; this run uses 2"),
        (MIGS.split(",")[0], 1, ""),
    ],
)
def test_num_processes_on_chosen_gpus_is_their_number_or_says_why_not(environ, gpus, capsys, chosen, count, says):
    environ["CUDA_VISIBLE_DEVICES"] = chosen
    gpus(count)
    assert num_processes("auto") == count
    err = capsys.readouterr().err
    assert says in err and bool(err) == bool(says)


@pytest.mark.parametrize("chosen", ["9", UUIDS, MIGS])
def test_num_processes_of_chosen_gpus_that_torch_does_not_see_is_refused(environ, gpus, chosen):
    environ["CUDA_VISIBLE_DEVICES"] = chosen
    gpus(0)
    with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES is {chosen}, but torch finds no such GPU"):
        num_processes("auto")
    assert num_processes("cpu") == 1


@pytest.mark.parametrize("chosen", ["", "-1", "NoDevFiles"])
def test_num_processes_where_gpus_are_hidden_is_one_on_the_cpu(environ, gpus, chosen):
    environ["CUDA_VISIBLE_DEVICES"] = chosen
    gpus(0)
    assert num_processes("auto") == 1
