"""A headless Chromium that is told over a pipe what to open and is asked what it shows."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PHONE, WIDE = (390, 844), (1600, 1000)
FAULTS = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed"}


def find_browser() -> str:
    """The first browser on PATH; a machine that has none can't say that the page works."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    raise RuntimeError(
        f"none of {', '.join(NAMES)} is on PATH: install one (Debian: apt-get install chromium), or leave these tests "
        "out with -m 'not browser'"
    )


class Browser:
    """One tab. Its protocol is Chrome DevTools': JSON in both directions, with a null byte after each message."""

    def __init__(self, folder: Path) -> None:
        """Start the browser; its profile lies in ``folder``."""
        low_in, ours_out = os.pipe()
        ours_in, low_out = os.pipe()
        # It reads from descriptor 3 and writes to 4, onto which those that are handed over must not fall.
        theirs_in, theirs_out = (fcntl.fcntl(low, fcntl.F_DUPFD, 10) for low in (low_in, low_out))
        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out} {theirs_in}<&- {theirs_out}>&-', "browser"),
                *(find_browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                # A container's shared memory may be too small.
                *("--disable-dev-shm-usage", "--no-first-run", "--disable-extensions", "--remote-debugging-pipe"),
                *(f"--user-data-dir={folder}", "about:blank"),
            ],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for descriptor in (low_in, low_out, theirs_in, theirs_out):
            os.close(descriptor)
        self._out, self._in = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb")
        self._number = 0
        self._session: str | None = None
        self._rest = b""
        self.events: list[dict[str, Any]] = []
        tab = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()
        self._in.close()
        self._process.terminate()
        self._process.wait(30)

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and return what it answers; events before the answer are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": arguments}
        if self._session is not None:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def wait_for(self, event: str) -> None:
        """Wait for an event that has not come yet."""
        while (found := self._next()).get("method") != event:
            self.events.append(found)
        self.events.append(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._in.fileno(), 1 << 16)
            assert chunk, "the browser has ended"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, page: Path, size: tuple[int, int] = WIDE, *, dark: bool = False) -> None:
        """Load a page, and wait until its charts are drawn.

        Args:
            page: a file.
            size: of the window, in CSS pixels; below 600 wide it is a phone's, with touch.
            dark: what the system prefers.
        """
        self.events.clear()
        phone = size[0] < 600
        self.ask("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=phone)
        self.ask("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        # Whatever the page would fetch fails, and is seen.
        self.ask("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        self.ask("Page.navigate", url=page.resolve().as_uri())
        self.settle()

    def settle(self) -> None:
        """Wait until Bokeh has drawn everything, and the page has set its colours."""
        self.wait_for("Page.loadEventFired")
        self.idle()

    def idle(self) -> None:
        """Wait until nothing is left to be drawn."""
        self.value(
            """new Promise((done) => {
                let quiet = 0;
                const look = () => {
                    const ready = document.documentElement.dataset.drawn && Bokeh.documents[0].is_idle;
                    quiet = ready ? quiet + 1 : 0;
                    quiet > 10 ? done(true) : requestAnimationFrame(look);
                };
                look();
            })"""
        )

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is, awaited if it is a promise; plain values."""
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def faults(self) -> list[dict[str, Any]]:
        """Errors and warnings of the page so far, and what it tried in vain to load."""
        found = [event for event in self.events if event.get("method") in FAULTS]
        return [event for event in found if event["params"].get("type") not in ("log", "info", "debug")]

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """Write what is seen, or the whole page, as PNG."""
        answer = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))
