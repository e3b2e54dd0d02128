"""Virtual hosts for tests: Linux namespaces, each with its own processes, host name and network address.

They share this machine's disk, like the nodes of a cluster, and nothing else. Killing the first process of a host kills
all its processes at once and silently, like a loss of power.
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
    """Return why this machine cannot create such hosts; None if it can."""
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        return f"needs {' and '.join(missing)} (Debian, Ubuntu: apt-get install util-linux iproute2)"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True, timeout=HANGS_AFTER_S
    )
    return f"needs root, and a kernel with namespaces: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """One virtual host."""

    def __init__(self, name: str, address: str, ended: ExitStack, namespaces: tuple[str, ...]):
        self.name, self.address, self.namespaces = name, address, namespaces
        self._outer = _machine(ended, *namespaces)
        self.pid = _first_child(self._outer.pid)

    def command(self, *command: object) -> list[str]:
        """Return the command to start here that runs `command` on the host."""
        return ["nsenter", f"--target={self.pid}", *self.namespaces, "--", *map(str, command)]

    def run(self, *command: object) -> None:
        """Run a command on the host and wait for it."""
        subprocess.run(self.command(*command), check=True, timeout=HANGS_AFTER_S)

    def link(self, state: str) -> None:
        """Set the network link `down`, like an unplugged cable, or `up`."""
        self.run("ip", "link", "set", "eth0", state)

    def kill(self) -> None:
        """Kill the host; all its processes have ended when this returns."""
        os.kill(self.pid, signal.SIGKILL)
        self._outer.wait(timeout=HANGS_AFTER_S)


@contextmanager
def network(folder: Path, *names: str) -> Iterator[list[Host]]:
    """Context manager: a head host, then hosts of these names, connected by a switch.

    The head has no PID namespace of its own, so that the others can be entered from it.
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
        process.kill()  # --kill-child then kills the child
        process.wait(timeout=HANGS_AFTER_S)

    ended.callback(end)
    return process


def _first_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while not children.read_text():  # until unshare has forked
        pass
    return int(children.read_text().split()[0])
