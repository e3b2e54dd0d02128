"""A headless Chromium, driven by its DevTools protocol over pipes; requires only the browser."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers import HANGS_AFTER_S

NAMES = ("chromium-headless-shell", "chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-pipe",
)


def find_browser() -> str | None:
    """Return the path of Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A browser tab: it takes commands and records its events in `events`."""

    def __init__(self, browser: "_Browser", session: str):
        self.browser, self.session, self.events = browser, session, []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: object) -> dict[str, Any]:
        """Send a command and return its result."""
        return self.browser.send(method, parameters, self)

    def open(self, url: str) -> None:
        """Navigate to a page and wait until it has loaded."""
        before = self._loaded()
        self.send("Page.navigate", url=url)
        while self._loaded() == before:
            self.browser.receive(self)

    def _loaded(self) -> int:
        return sum(event["method"] == "Page.loadEventFired" for event in self.events)

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression, awaited."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition: str) -> Any:
        """Wait until an expression is truthy and return its value."""
        deadline = time.monotonic() + HANGS_AFTER_S
        while not (value := self.run(condition)):
            assert time.monotonic() < deadline, f"never true: {condition}"
            time.sleep(0.05)
        return value

    def mouse(self, points: list[tuple[float, float]]) -> None:
        """Draw a line with the mouse through points in window coordinates."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*points, points[-1]], strict=True):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def touch(self, points: list[tuple[float, float]]) -> None:
        """Draw a line with a finger."""
        for index, (x, y) in enumerate(points):
            self.send(
                "Input.dispatchTouchEvent", type="touchMove" if index else "touchStart", touchPoints=[{"x": x, "y": y}]
            )
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str, times: int = 1, **more: object) -> None:
        """Press a key `times` times; a character key types its character."""
        text = {"text": key} if len(key) == 1 and not more else {}
        for _ in range(times):
            self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **more)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **more)

    def choose(self, selector: str, files: list[Path]) -> None:
        """Choose files for a file input."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=list(map(str, files)))

    def screenshot(self, path: Path) -> None:
        """Write a PNG file of the whole page."""
        taken = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))


class _Browser:
    """The browser process; messages are JSON, each terminated by a zero byte."""

    def __init__(self, process: subprocess.Popen, commands: int, answers: int):
        self.process, self._commands, self._answers = process, commands, os.fdopen(answers, "rb")
        self._number, self._rest = 0, b""

    def send(self, method: str, parameters: dict[str, object], page: Page | None = None) -> dict[str, Any]:
        """Send a command and return its result; events that arrive first are recorded in `page`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._commands, json.dumps(message | ({"sessionId": page.session} if page else {})).encode() + b"\0")
        while (answer := self.receive(page)).get("id") != self._number:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def receive(self, page: Page | None) -> dict[str, Any]:
        """Return the next message; an event is also recorded in `page`."""
        while b"\0" not in self._rest:
            more = os.read(self._answers.fileno(), 1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(first)
        if page and "method" in message:
            page.events.append(message)
        return message


@contextmanager
def browser(path: str, profile: Path) -> Iterator[Page]:
    """Context manager: a browser with an empty profile and one tab."""
    (its_in, commands), (answers, its_out) = os.pipe(), os.pipe()
    ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (its_in, its_out)]  # not 3 or 4, which the shell assigns
    os.close(its_in)
    os.close(its_out)
    shell = ["bash", "-c", 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"', *map(str, ends)]
    command = [*shell, path, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for fd in ends:
        os.close(fd)
    try:
        chrome = _Browser(process, commands, answers)
        target = chrome.send("Target.createTarget", {"url": "about:blank"})["targetId"]
        yield Page(chrome, chrome.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"])
    finally:
        os.close(commands)  # makes the browser exit with all its processes
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()
            os.close(answers)
