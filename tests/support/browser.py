"""A page in headless Chromium, driven over its DevTools protocol: real time, real network, any width."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium")
Command = Callable[..., dict[str, Any]]
"""command(method, **params) -> result, as in https://chromedevtools.github.io/devtools-protocol."""


@contextmanager
def open_page(url: str, folder: Path, width: int, height: int = 900) -> Iterator[Command]:
    """The page at a URL, once it has loaded."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    profile, port_file = f"--user-data-dir={folder}", folder / "DevToolsActivePort"
    process = subprocess.Popen(
        [str(CHROMIUM), *options, profile, "--remote-debugging-port=0", "about:blank"], stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 60
        while not port_file.exists() or not port_file.read_text().strip():
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.05)
        pages = httpx.get(f"http://127.0.0.1:{port_file.read_text().split()[0]}/json").json()
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        with connect(address, max_size=None) as socket:
            numbers = itertools.count()

            def command(method: str, **params: Any) -> dict[str, Any]:
                socket.send(json.dumps({"id": (number := next(numbers)), "method": method, "params": params}))
                while (answer := json.loads(socket.recv(timeout=120))).get("id") != number:
                    pass
                assert "error" not in answer, answer["error"]
                return answer["result"]

            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
            command("Emulation.setDeviceMetricsOverride", **size)
            command("Page.navigate", url=url)
            while value_of(command, "document.readyState") != "complete":
                time.sleep(0.05)
            yield command
    finally:
        process.terminate()
        process.wait()


def value_of(command: Command, expression: str) -> Any:
    """The value of a JavaScript expression in the page, awaited."""
    found = command("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
    assert "exceptionDetails" not in found, found["exceptionDetails"]
    return found["result"].get("value")


def screenshot(command: Command, path: Path) -> None:
    """All of the page as PNG."""
    taken = command("Page.captureScreenshot", format="png", captureBeyondViewport=True)
    path.write_bytes(base64.b64decode(taken["data"]))
