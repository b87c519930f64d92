"""A headless Chromium, controlled through a pipe with the DevTools protocol; no driver and no package is needed."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
         "--remote-debugging-pipe"]  # fmt: skip
SECONDS = 60.0


class Chromium:
    """A browser with contexts that know nothing of each other."""

    def __init__(self, profile: Path):
        assert PROGRAM is not None
        ours, theirs = os.pipe(), os.pipe()
        # Chromium reads from 3 and writes to 4: the pipe's ends must not lie there already.
        reads, writes = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (ours[0], theirs[1]))
        os.close(ours[0])
        os.close(theirs[1])
        silent = os.open(os.devnull, os.O_RDWR)
        actions = [
            (os.POSIX_SPAWN_DUP2, end, place) for end, place in ((silent, 1), (silent, 2), (reads, 3), (writes, 4))
        ]
        self._process = os.posix_spawn(PROGRAM, [PROGRAM, *FLAGS, f"--user-data-dir={profile}"], os.environ, file_actions=actions, setpgroup=0)  # fmt: skip
        for end in (reads, writes, silent):
            os.close(end)
        self._to, self._from = os.fdopen(ours[1], "wb", buffering=0), os.fdopen(theirs[0], "rb", buffering=0)
        os.set_blocking(self._from.fileno(), False)
        self._buffer = b""
        self._last = 0
        self.events: list[dict] = []

    def ask(self, method: str, session: str | None = None, **words: object) -> dict:
        """Return the result of a command; events that arrive meanwhile are stored."""
        self._last += 1
        number = self._last
        message = {"id": number, "method": method, "params": words} | ({"sessionId": session} if session else {})
        self._to.write(json.dumps(message).encode() + b"\0")
        for said in self._said():
            if said.get("id") == number:
                assert "error" not in said, f"{method}: {said['error']}"
                return said["result"]
        raise AssertionError(f"{method}: the browser gave no answer within {SECONDS:g} s")

    def _said(self) -> Iterator[dict]:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            while b"\0" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\0")
                said = json.loads(line)
                if "id" not in said:
                    self.events.append(said)
                yield said
            more = self._from.read(1 << 20)
            assert more != b"", "the browser has ended"
            if more is None:
                time.sleep(0.01)
            else:
                self._buffer += more

    def new_tab(self, address: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> "Tab":
        """A tab in a context of its own."""
        context = self.ask("Target.createBrowserContext")["browserContextId"]
        target = self.ask("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session, context)
        for domain in ("Page", "Network", "Runtime", "DOM", "Log", "Accessibility"):
            tab.ask(f"{domain}.enable")
        tab.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.ask("Emulation.setEmulatedMedia", features=[scheme])
        tab.ask("Page.navigate", url=address)
        return tab

    def close(self) -> None:
        """Ends it and all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        self._to.close()
        self._from.close()


class Tab:
    """One page in a browser."""

    def __init__(self, browser: Chromium, session: str, context: str):
        self._browser, self._session, self.context = browser, session, context

    def ask(self, method: str, **words: object) -> dict:
        """The result of a command to this page."""
        return self._browser.ask(method, self._session, **words)

    def run(self, script: str) -> object:
        """The value of a script."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str) -> object:
        """The value of a script as soon as it is true."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            found = self.run(script)
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}; the page says: {self.run('document.body.innerText')}")

    def choose_files(self, selector: str, files: list[Path]) -> None:
        """Chooses files in a file field, as its user does."""
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.ask("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def press(self, key: str, code: int, text: str = "") -> None:
        """Presses a key."""
        words = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **words, **({"text": text} if text else {}))
        self.ask("Input.dispatchKeyEvent", type="keyUp", **words)

    def events(self, method: str) -> list[dict]:
        """What happened in this page so far."""
        self.run("0")  # what is under way comes before the answer to this
        return [
            event["params"]
            for event in self._browser.events
            if event["method"] == method and event.get("sessionId") == self._session
        ]

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Writes the page as it looks, as PNG."""
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))
