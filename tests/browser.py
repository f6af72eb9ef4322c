"""A headless Chromium for tests of pages, where one is installed."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Chromium:
    """A headless browser without network, spoken to in DevTools' protocol over two pipes."""

    def __init__(self, profile: Path) -> None:
        down, self._write = os.pipe()
        self._read, up = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--mute-audio"]
        quiet = ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe"]
        command = ["bash", "-c", f'exec "$@" 3<&{down} 4>&{up} 2>/dev/null', "bash", str(BROWSER), *flags, *quiet]
        self._process = subprocess.Popen([*command, f"--user-data-dir={profile}"], pass_fds=(down, up))
        os.close(down)
        os.close(up)
        self._stream = os.fdopen(self._read, "rb")
        self._count, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and read until its answer; what comes in between is kept as events."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda m: m.get("id") == self._count)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path) -> dict[str, Any]:
        """Load a page; its broken pictures and posters, the local files it misses, and its film players."""
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        if not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self._until(lambda m: m.get("method") == "Page.loadEventFired")
        script = """Promise.all([...document.querySelectorAll("video[poster]")].map(v => new Promise(done => {
          const image = new Image(); image.onload = () => done(null); image.onerror = () => done(v.poster);
          image.src = v.poster;
        }))).then(posters => ({
          posters: posters.filter(Boolean),
          images: [...document.images].map(i => [i.src, i.complete && !i.naturalWidth])
            .filter(([src, bad]) => bad && src.startsWith("file:")).map(([src]) => src),
        }))"""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        sent = {
            e["params"]["requestId"]: e["params"]["request"]["url"] for e in self._events("Network.requestWillBeSent")
        }
        failed = [sent.get(e["params"]["requestId"], "") for e in self._events("Network.loadingFailed")]
        return {**answer["result"]["value"], "files": [url for url in failed if url.startswith("file:")]}

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)
        self._stream.close()
        os.close(self._write)

    def _events(self, method: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e.get("method") == method]

    def _until(self, wanted: Any) -> dict[str, Any]:
        while True:
            while b"\0" not in self._buffer:
                chunk = os.read(self._read, 1 << 16)
                assert chunk, "the browser has ended"
                self._buffer += chunk
            text, self._buffer = self._buffer.split(b"\0", 1)
            message = json.loads(text)
            self.events.append(message)
            if wanted(message):
                return message


@contextmanager
def opened(profile: Path) -> Iterator[Chromium]:
    """A browser; the test is skipped where none is installed."""
    if BROWSER is None:
        pytest.skip("Chromium is not installed")
    chromium = Chromium(profile)
    yield chromium
    chromium.close()
