"""Chromium, driven by its DevTools protocol over a pipe: real clicks, drags, touches and keys, with the standard library alone.

A message is JSON that ends with a zero byte; the browser reads them from its file descriptor 3 and writes to 4.
Source: chromedevtools.github.io/devtools-protocol; the pipe is --remote-debugging-pipe.
"""
from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--force-device-scale-factor=1", "--remote-debugging-pipe")
PATIENCE = 60           # seconds for an answer


class Browser:
    """One tab.  `complaints` holds what pages wrote to the console or threw, `requested` every address that was asked for."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        (here_in, its_out), (its_in, here_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (its_in, its_out)]      # so that 3 and 4 are free to be set
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]} {high[0]}<&- {high[1]}>&-', "bash", CHROMIUM, *QUIET,
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=high, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (its_in, its_out, *high):
            os.close(end)
        self._in, self._out, self._rest, self._number, self._session = here_in, here_out, b"", 0, ""
        self.complaints: list[str] = []
        self.requested: list[str] = []
        self._loaded = False
        target = next(each for each in self.send("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        os.close(self._out)                 # it ends when its pipe does
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)

    def send(self, method: str, **parameters: Any) -> Any:
        """A command, and what it answers."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the browser says nothing for {PATIENCE} s"
            more = os.read(self._in, 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, told: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled":
            self.complaints.append(" ".join(str(each.get("value", each)) for each in told["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"].get("exception", told["exceptionDetails"])))
        elif method == "Log.entryAdded":
            self.complaints.append(told["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requested.append(told["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def wait_for_load(self) -> None:
        """Until the page that was asked for, by `open` or by a click, is there."""
        while not self._loaded:
            self._read()
        self._loaded = False

    def open(self, path: Path) -> None:
        """A file."""
        self._loaded = False
        self.send("Page.navigate", url=path.absolute().as_uri())
        self.wait_for_load()

    def screen(self, width: int, height: int = 900, dark: bool = False, medium: str = "", touch: bool = False) -> None:
        """What the page is shown on."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.send("Emulation.setEmulatedMedia", media=medium,
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def settle(self) -> None:
        """Until what was set in motion has been drawn."""
        self.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def middle(self, selector: str) -> tuple[float, float]:
        """Where an element is on the screen, brought into view first; of one that goes over several lines the first."""
        found = self.ask(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
                         "e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getClientRects()[0]; "
                         "return [b.x + b.width / 2, b.y + b.height / 2]; })()")
        return float(found[0]), float(found[1])

    def click(self, selector: str) -> None:
        """Move there, press, let go."""
        x, y = self.middle(selector)
        self.drag((x, y), [(x, y)])

    def drag(self, start: tuple[float, float], way: Sequence[tuple[float, float]]) -> None:
        """Press the mouse, move it along a way, let it go."""
        for kind, (x, y), held in [("mouseMoved", start, 0), ("mousePressed", start, 1), *(("mouseMoved", at, 1) for at in way),
                                   ("mouseReleased", way[-1], 0)]:
            pressed = kind != "mouseMoved"
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left" if pressed or held else "none",
                      buttons=held, clickCount=int(pressed))

    def swipe(self, start: tuple[float, float], way: Sequence[tuple[float, float]]) -> None:
        """The same with a finger."""
        for kind, points in [("touchStart", [start]), *(("touchMove", [at]) for at in way), ("touchEnd", [])]:
            self.send("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y} for x, y in points])

    def key(self, name: str) -> None:
        """Press a key and let it go."""
        codes = {"ArrowRight": 39, "ArrowLeft": 37, "Tab": 9, "Enter": 13, " ": 32}
        for kind in ("keyDown", "keyUp"):
            typed = {" ": " ", "Enter": "\r"}.get(name, "") if kind == "keyDown" else ""
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name.strip() or "Space",
                      windowsVirtualKeyCode=codes[name], text=typed)

    def picture(self, path: Path, whole: bool = True) -> None:
        """The page as a PNG."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole, **({"clip": {
            "x": 0, "y": 0, "scale": 1, "width": self.ask("innerWidth"),
            "height": self.ask("document.documentElement.scrollHeight")}} if whole else {}))
        path.write_bytes(base64.b64decode(found["data"]))
