"""A real browser without a window: Chromium, spoken to in its DevTools protocol over a pipe.

`--remote-debugging-pipe` reads commands from descriptor 3 and answers on descriptor 4, one JSON text and a zero byte
each, so no package is needed.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Seconds that any answer may take; a machine under load is slow, not broken.
PATIENCE = 120.0
# Gathered in the page: how wide it is, and which boxes of text lie over each other.
MEASURE = """
(() => {
  // Of the told text, tokens are pieces of words; what is no text is not seen.
  const PASSED_OVER = "script, style, title, option, .t, .prompt";
  const clipped = (node, box) => {
    for (let up = node.parentElement; up; up = up.parentElement) {
      const kind = getComputedStyle(up);
      if (kind.display === "none" || kind.visibility === "hidden" || kind.clipPath !== "none") return null;
      if (kind.overflowX === "visible" && kind.overflowY === "visible") continue;
      const frame = up.getBoundingClientRect();
      box = { left: Math.max(box.left, frame.left), right: Math.min(box.right, frame.right),
              top: Math.max(box.top, frame.top), bottom: Math.min(box.bottom, frame.bottom) };
    }
    const { left, right, top, bottom } = box;
    return right - left > 1 && bottom - top > 1 ? { left, right, top, bottom } : null;
  };
  const words = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    if (!node.data.trim() || node.parentElement.closest(PASSED_OVER)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const found of range.getClientRects()) {
      const box = clipped(node, found);
      if (box) words.push({ text: node.data.trim().slice(0, 40), node, size: found.height, ...box });
    }
  }
  words.sort((a, b) => a.top - b.top);
  const slack = 2, overlaps = [];
  for (let i = 0; i < words.length; i++) {
    for (let j = i + 1; j < words.length && words[j].top < words[i].bottom - slack; j++) {
      const a = words[i], b = words[j];
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (a.node !== b.node && wide > slack && high > slack + 1) overlaps.push([a.text, b.text]);
    }
  }
  const root = document.documentElement;
  return { width: root.scrollWidth, height: root.scrollHeight, view: root.clientWidth, words: words.length, overlaps,
           smallest: Math.min(...words.map((w) => w.size)) };
})()
"""


def find() -> str | None:
    """The browser's program, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab. `messages`: what the page wrote to the console, errors of its scripts, and refused loads; `requests`:
    every address that it asked for."""

    def __init__(self, process: subprocess.Popen, to: int, back: int):
        self._process, self._to, self._back = process, to, back
        self._number, self._buffer, self._session = 0, b"", None
        self.events: list[dict[str, Any]] = []
        self.messages: list[str] = []
        self.requests: list[str] = []

    def _read(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError("the browser does not answer")
            got = os.read(self._back, 1 << 20)
            if not got:
                raise ConnectionError(f"the browser is gone, exit code {self._process.poll()}")
            self._buffer += got
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def _note(self, event: dict[str, Any]) -> None:
        name, what = event["method"], event.get("params", {})
        self.events.append(event)
        if name == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(a.get("value", a.get("description"))) for a in what["args"]))
        elif name == "Runtime.exceptionThrown":
            details = what["exceptionDetails"]
            self.messages.append(details.get("exception", {}).get("description") or details["text"])
        elif name == "Log.entryAdded":
            self.messages.append(what["entry"]["text"])
        elif name == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        sent = json.dumps(message).encode() + b"\0"
        while sent:
            sent = sent[os.write(self._to, sent) :]
        until = time.monotonic() + PATIENCE
        while True:
            answer = self._read(until)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if "method" in answer:
                self._note(answer)

    def begin(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, width: int, height: int = 900, dark: bool = False, query: str = "") -> float:
        """Load a file in a window of so many CSS pixels; seconds from the start of the navigation to its end."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.messages.clear()
        self.requests.clear()
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri() + query)
        until = time.monotonic() + PATIENCE
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            answer = self._read(until)
            if "method" in answer:
                self._note(answer)
        timing = self.run(
            "(([n]) => [n.loadEventEnd, n.domContentLoadedEventEnd])(performance.getEntriesByType('navigation'))"
        )
        return max(timing) / 1e3

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", "script failed"))
        return found["result"].get("value")

    def point(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def shoot(self, path: Path, whole: bool = True) -> None:
        """A PNG of the page, or of the window."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def browser(program: str) -> Iterator[Page]:
    """A page of a browser that leaves nothing behind."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        read_there, to = os.pipe()
        back, write_there = os.pipe()

        def place() -> None:
            # By way of high numbers: 3 and 4 may be ends of these very pipes.
            high_in, high_out = os.dup2(read_there, 61), os.dup2(write_there, 62)
            os.dup2(high_in, 3)
            os.dup2(high_out, 4)

        process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
             "--remote-debugging-pipe", f"--user-data-dir={home}"],
            preexec_fn=place, close_fds=False, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HOME": home},
        )  # fmt: skip
        os.close(read_there)
        os.close(write_there)
        page = Page(process, to, back)
        try:
            page.begin()
            yield page
        finally:
            os.close(to)
            os.close(back)
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
