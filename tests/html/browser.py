"""A real headless browser, driven over the DevTools protocol through a pipe."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    """The browser's path, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class CannotStartError(Exception):
    """The browser is there and does not run here."""


@dataclass
class Browser:
    """One page of a running browser.

    `complaints` are console errors and warnings, uncaught exceptions and what the browser itself
    logs, `requests` the addresses that the page asked for, `blocked` why any of them were not sent.
    """

    write_fd: int
    read_fd: int
    timeout_s: float
    session: str = ""
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    _last: int = 0
    _buffer: bytes = b""

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are noted."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_fd, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self.timeout_s
        while (answer := self._next(deadline)).get("id") != self._last:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def start(self) -> None:
        """Make a page, and listen to it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, page: Path) -> None:
        """Load a file and wait until it is there."""
        self.complaints.clear()
        self.requests.clear()
        self.blocked.clear()
        self.seen.clear()
        self.call("Page.navigate", url=page.absolute().as_uri())
        deadline = time.monotonic() + self.timeout_s
        while "Page.loadEventFired" not in self.seen:
            self._note(self._next(deadline))
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")

    def resize(self, width: int, height: int = 800) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def dark(self, on: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; the page's content policy does not apply to it."""
        made = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in made, made["exceptionDetails"]
        return made["result"].get("value")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method", ""), message.get("params", {})
        self.seen.add(method)
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.loadingFailed":
            self.blocked.append(params.get("blockedReason", params["errorText"]))

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select(
                [self.read_fd], [], [], max(0.0, deadline - time.monotonic())
            )
            assert ready, f"the browser did not answer within {self.timeout_s} s"
            data = os.read(self.read_fd, 1 << 16)
            assert data, "the browser ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


@contextmanager
def browser(path: str, profile: Path, timeout_s: float = 60.0) -> Iterator[Browser]:
    """A browser with one empty page; ended, and waited for, on the way out.

    Raises CannotStartError where it ends or hangs before it has shown a page.
    """
    ours_read, its_write = os.pipe()
    its_read, ours_write = os.pipe()
    # Away from 3 and 4, which the browser reads and writes, before they are put there.
    low = (its_read, its_write)
    its_read, its_write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 32) for fd in low)
    for fd in low:
        os.close(fd)

    def place() -> None:
        os.dup2(its_read, 3)
        os.dup2(its_write, 4)

    process = subprocess.Popen(
        [
            path,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-extensions", "--disable-background-networking"),
            *("--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"),
        ],
        preexec_fn=place,
        pass_fds=(3, 4),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(its_read)
    os.close(its_write)
    made = Browser(ours_write, ours_read, timeout_s)
    try:
        try:
            made.start()
        except (OSError, AssertionError) as error:
            raise CannotStartError(f"{path} does not start: {error}") from error
        yield made
    finally:
        os.close(ours_write)  # the browser ends when its pipe does
        os.close(ours_read)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
