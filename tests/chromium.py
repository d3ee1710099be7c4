"""Drives a headless Chromium over the DevTools protocol: as much of it as the book's tests need."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    # a tab that another one covers goes on as fast
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
    "--no-proxy-server",
    "--remote-debugging-port=0",
)
PATIENCE = 30.0  # seconds
GONE = (
    "Inspected target navigated or closed",
    "Execution context was destroyed",
    "Cannot find context",
)


def executable() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """The process. `address`: where it is told what to do."""

    def __init__(self, profile: Path) -> None:
        program = executable()
        if program is None:
            raise RuntimeError(
                f"REQUIRE_BROWSER=1, but there is none of {', '.join(NAMES)} on the PATH"
            )
        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port_file = profile / "DevToolsActivePort"
        _wait(
            lambda: port_file.exists() and "\n" in port_file.read_text(),
            "Chromium opens its debugging port",
        )
        port, path = port_file.read_text().split("\n")[:2]
        self.address = f"ws://127.0.0.1:{port}{path}"

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=PATIENCE)


class Browser:
    """One tab. `requests` and `errors` hold what the page asked for and complained about since it was opened."""

    def __init__(self, chromium: Chromium) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._loaded: set[str] = set()
        self._origins: set[str] = set()
        self._number = 0
        self._socket = websocket.create_connection(
            chromium.address, suppress_origin=True, timeout=PATIENCE
        )
        self._session: str | None = None
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result; events that arrive meanwhile are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(
            json.dumps(message | ({"sessionId": self._session} if self._session else {}))
        )
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}({parameters}): {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        name, told = event.get("method"), event.get("params", {})
        if name == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif name == "Page.lifecycleEvent" and told["name"] == "load":
            self._loaded.add(told["loaderId"])
        elif name == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif name == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.errors.append(
                " ".join(str(part.get("value", part.get("description"))) for part in told["args"])
            )
        elif name == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        """Go to a page and wait until it, or the page it sends us on to, is loaded and its equations are typeset."""
        self.requests, self.errors = [], []
        parts = urlsplit(url)
        self._origins.add(f"{parts.scheme}://{parts.netloc}")
        answer = self.call("Page.navigate", url=url)
        if answer.get("errorText"):
            raise RuntimeError(f"{url}: {answer['errorText']}")
        while answer["loaderId"] not in self._loaded:
            self._note(json.loads(self._socket.recv()))
        self.wait("""document.readyState === 'complete' && !document.querySelector('meta[http-equiv="refresh"]')
                     && (!document.querySelector('script[src*="mathjax"]') || window.MathJax?.startup?.promise?.then(() => true))""")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(
                f"{script}: {answer['exceptionDetails'].get('exception', {}).get('description')}"
            )
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until a JavaScript expression is truthy, in JavaScript's sense: an element, by value, is an empty dictionary here."""

        def holds() -> Any:
            try:
                return self.evaluate(f"(async () => Boolean(await ({script})))()")
            except RuntimeError as error:
                if not any(gone in str(error) for gone in GONE):
                    raise
                return False  # the page went on to another one while we asked

        _wait(holds, script)

    def size(self, width: int, height: int, mobile: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )

    def prefer(self, scheme: str) -> None:
        """What the system says it prefers: `light` or `dark`."""
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    def screenshot(self, path: Path, whole: bool = False) -> None:
        path.write_bytes(
            base64.b64decode(
                self.call(
                    "Page.captureScreenshot",
                    captureBeyondViewport=whole,
                    **(
                        {
                            "clip": {
                                "x": 0,
                                "y": 0,
                                **self.evaluate(
                                    "({width: innerWidth, height: document.documentElement.scrollHeight})"
                                ),
                                "scale": 1,
                            }
                        }
                        if whole
                        else {}
                    ),
                )["data"]
            )
        )

    def close(self) -> None:
        """The next tab finds nothing of what pages stored here; scripts that were loaded it finds in the cache."""
        for origin in self._origins:
            self.call("Storage.clearDataForOrigin", origin=origin, storageTypes="all")
        self._session = None  # the browser is told, and not the tab
        self.call("Target.closeTarget", targetId=self._target)
        self._socket.close()


def _wait(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {PATIENCE:.0f} s in vain until: {what}")
        time.sleep(0.05)
