"""How many cores a process may use in a container: control groups as Linux, Docker and Kubernetes lay them out."""

import os
from pathlib import Path

import pytest

from dist_mnist.distributed.cores import num_cores

UNIFIED, CPU = "sys/fs/cgroup", "sys/fs/cgroup/cpu"
OF_V1 = "12:cpuset:/\n5:cpu,cpuacct:{}\n1:name=systemd:/a\n0::/\n"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A function that writes files below a root folder, on a machine of eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {f"{UNIFIED}/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {f"{UNIFIED}/cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {f"{UNIFIED}/cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {f"{UNIFIED}/cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {f"{UNIFIED}/cpu.max": "9900000 100000\n"}, 8),
        ("0::/\n", {f"{UNIFIED}/cpu.max": "many\n"}, 8),
        ("0::/a/b\n", {f"{UNIFIED}/a/b/cpu.max": "max 100000\n", f"{UNIFIED}/a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {f"{UNIFIED}/a/b/cpu.max": "100000 50000\n", f"{UNIFIED}/a/cpu.max": "300000 100000\n"}, 2),
        ("0::/on/the/host\n", {f"{UNIFIED}/cpu.max": "150000 100000\n"}, 2),
        (OF_V1.format("/"), {f"{CPU}/cpu.cfs_quota_us": "-1\n", f"{CPU}/cpu.cfs_period_us": "100000\n"}, 8),
        (OF_V1.format("/a"), {f"{CPU}/a/cpu.cfs_quota_us": "400000\n", f"{CPU}/a/cpu.cfs_period_us": "100000\n"}, 4),
        (OF_V1.format("/host"), {f"{CPU}/cpu.cfs_quota_us": "50000\n", f"{CPU}/cpu.cfs_period_us": "10000\n"}, 5),
        ("", {}, 8),
    ],
)
def test_num_cores_are_those_of_the_quota_or_fewer(system, groups, files, expected):
    assert num_cores(system({"proc/self/cgroup": groups, **files})) == expected


def test_num_cores_without_control_groups_are_those_that_the_process_is_bound_to(tmp_path, system):
    assert num_cores(tmp_path) == 8


def test_num_cores_of_fewer_than_the_quota_are_those_that_the_process_is_bound_to(system, monkeypatch):
    root = system({"proc/self/cgroup": "0::/\n", f"{UNIFIED}/cpu.max": "400000 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert num_cores(root) == 1
