"""Machines to test with: namespaces of Linux, each with processes, a name and a network address of its own.

They share this machine's disk, as the machines of a cluster do, and nothing else. Ending the first process of one ends
all in it, at once and without a word, as a loss of power does.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from helpers import HANGS_AFTER_S

HEAD = ("--net", "--uts", "--mount")
NAMESPACES = (*HEAD, "--pid")
TOOLS = ("unshare", "nsenter", "ip", "mount")


def why_not() -> str | None:
    """What keeps this machine from having such hosts; None if nothing does."""
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        return f"needs {' and '.join(missing)} (Debian, Ubuntu: apt-get install util-linux iproute2)"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True, timeout=HANGS_AFTER_S
    )
    return f"needs root, and a kernel with namespaces: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """One machine."""

    def __init__(self, name: str, address: str, ended: ExitStack, namespaces: tuple[str, ...]):
        self.name, self.address, self.namespaces = name, address, namespaces
        self._outer = _machine(ended, *namespaces)
        self.pid = _first_child(self._outer.pid)

    def command(self, *command: object) -> list[str]:
        """What to start here to have `command` run there."""
        return ["nsenter", f"--target={self.pid}", *self.namespaces, "--", *map(str, command)]

    def run(self, *command: object) -> None:
        """Run a command there, to its end."""
        subprocess.run(self.command(*command), check=True, timeout=HANGS_AFTER_S)

    def link(self, state: str) -> None:
        """Pull the plug (`down`), or put it in again (`up`)."""
        self.run("ip", "link", "set", "eth0", state)

    def kill(self) -> None:
        """End the machine: all its processes are gone before this returns."""
        os.kill(self.pid, signal.SIGKILL)
        self._outer.wait(timeout=HANGS_AFTER_S)


@contextmanager
def network(folder: Path, *names: str) -> Iterator[list[Host]]:
    """Hosts of these names, and before them a head, connected by a switch; gone after the `with` block.

    The head has no process numbers of its own, so that others can be entered from it.
    """
    with ExitStack() as ended:
        switch = _machine(ended, "--net")
        inside = ["nsenter", f"--target={_first_child(switch.pid)}", "--net", "--", "ip", "link"]
        subprocess.run([*inside, "add", "switch", "type", "bridge"], check=True, timeout=HANGS_AFTER_S)
        subprocess.run([*inside, "set", "switch", "up"], check=True, timeout=HANGS_AFTER_S)
        hosts = [Host("head", "10.66.0.1", ended, HEAD)]
        hosts += [Host(name, f"10.66.0.{i}", ended, NAMESPACES) for i, name in enumerate(names, 2)]
        table = folder / "hosts"
        table.write_text("127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts))
        for host in hosts:
            host.run("mount", "-t", "proc", "proc", "/proc")
            host.run("mount", "--bind", table, "/etc/hosts")
            host.run("sh", "-c", f"echo {host.name} >/proc/sys/kernel/hostname")
            cable = ["add", f"to-{host.name}", "type", "veth", "peer", "name", "eth0", "netns", str(host.pid)]
            subprocess.run([*inside, *cable], check=True, timeout=HANGS_AFTER_S)
            subprocess.run(
                [*inside, "set", f"to-{host.name}", "master", "switch", "up"], check=True, timeout=HANGS_AFTER_S
            )
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "lo", "up")
            host.link("up")
        yield hosts


def _machine(ended: ExitStack, *namespaces: str) -> "subprocess.Popen[bytes]":
    command = ["unshare", *namespaces, "--fork", "--kill-child", "sleep", "infinity"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)

    def end() -> None:
        process.kill()  # which --kill-child passes on
        process.wait(timeout=HANGS_AFTER_S)

    ended.callback(end)
    return process


def _first_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while not children.read_text():  # until unshare has come to fork
        pass
    return int(children.read_text().split()[0])
