"""The tests' browser: tabs of one process don't see what another one stored, and what is cached still counts as asked for."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import chromium

pytestmark = pytest.mark.browser
SCRIPT = "globalThis.ran = true; " + "// long enough to be kept\n" * 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "page.html").write_text(
        '<!doctype html><link rel="icon" href="data:,"><script src="script.js"></script>'
    )
    (tmp_path / "script.js").write_text(SCRIPT)
    return tmp_path


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("over", ["http", "file"])
def test_a_new_tab_finds_nothing_that_another_one_stored(
    chromium_process: chromium.Chromium, folder: Path, address: str, over: str
) -> None:
    url = f"{address if over == 'http' else folder.as_uri()}/page.html"
    for _ in range(2):
        tab = chromium.Browser(chromium_process)
        tab.open(url)
        assert tab.evaluate("[localStorage.length, sessionStorage.length]") == [0, 0]
        tab.evaluate("localStorage.setItem('mode', 'dark'), sessionStorage.setItem('a', 'b')")
        assert tab.evaluate("[localStorage.length, sessionStorage.length]") == [1, 1]
        tab.close()


def test_a_cached_script_is_among_the_requests_and_can_be_blocked(
    chromium_process: chromium.Chromium, address: str
) -> None:
    for blocked in ([], [], ["*/script.js"]):
        tab = chromium.Browser(chromium_process)
        tab.call("Network.setBlockedURLs", urls=blocked)
        tab.open(f"{address}/page.html")
        assert f"{address}/script.js" in tab.requests
        assert tab.evaluate("Boolean(globalThis.ran)") == (not blocked)
        tab.close()
