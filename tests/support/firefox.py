"""Debian's Firefox, driven over Marionette, its own protocol: JSON on a socket.

Playwright drives only builds of its own.  Every proxy setting points at a closed port, so that a page that asks
for anything but files fails.
"""

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAM = shutil.which("firefox-esr") or shutil.which("firefox")
SETTINGS = {
    "marionette.port": 0,  # a free one, which Firefox writes into its profile
    "network.proxy.type": 1,
    "network.proxy.http": "127.0.0.1",
    "network.proxy.http_port": 9,
    "network.proxy.ssl": "127.0.0.1",
    "network.proxy.ssl_port": 9,
    "datareporting.policy.dataSubmissionEnabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.homepage_override.mstone": "ignore",  # no page about what is new
}
ERRORS = """return Services.console.getMessageArray().filter((m) => m instanceof Ci.nsIScriptError && !(m.flags & 1)
  && m.sourceName.startsWith(arguments[0])).map((m) => `${m.errorMessage} (${m.sourceName}:${m.lineNumber})`)"""


def open_live(firefox: "Firefox", page: Path) -> None:
    """Open the live page of a folder and wait until both of its models are there."""
    firefox.open((page / "index.html").as_uri() + "#still")
    firefox.wait_for("window.DMS_PAGE && DMS_PAGE.race.sides.length === 2")


class Firefox:
    """One headless Firefox with one tab and an empty profile."""

    def __init__(self, profile: Path, patience: float = 240) -> None:
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in SETTINGS.items()]
        (profile / "user.js").write_text("".join(lines))
        command = [PROGRAM, "--headless", "--marionette", "--remote-allow-system-access", "--no-remote"]
        self.process = subprocess.Popen(
            [*command, "--profile", profile], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port, until, self.number = profile / "MarionetteActivePort", time.monotonic() + patience, 0
        while not port.exists() or not port.read_text():
            if self.process.poll() is not None or time.monotonic() > until:
                self.process.kill()
                raise RuntimeError(f"{PROGRAM} did not start within {patience:g} s")
            time.sleep(0.1)
        self.socket = socket.create_connection(("127.0.0.1", int(port.read_text())), timeout=300)
        self._receive()  # its greeting
        self.call("WebDriver:NewSession")

    def call(self, command: str, **parameters):
        """What a command returns.  Raises RuntimeError for one that fails."""
        self.number += 1
        message = json.dumps([0, self.number, command, parameters]).encode()
        self.socket.sendall(b"%d:%b" % (len(message), message))
        _, _, error, result = self._receive()
        if error:
            raise RuntimeError(f"{command}: {error['message']}")
        return result.get("value") if isinstance(result, dict) else result

    def open(self, url: str) -> None:
        self.call("WebDriver:Navigate", url=url)

    def run(self, body: str, *values):
        """What a function's body returns in the page, called with ``values``."""
        return self.call("WebDriver:ExecuteScript", script=body, args=list(values), sandbox=None)

    def wait_for(self, expression: str, patience: float = 60) -> None:
        until = time.monotonic() + patience
        while not self.run(f"return Boolean({expression})"):
            if time.monotonic() > until:
                raise TimeoutError(f"{expression}: not within {patience:g} s")
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press and release a key, as WebDriver names it, on the element that has the focus."""
        actions = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.call("WebDriver:PerformActions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def errors(self, source: str) -> list[str]:
        """Errors, warnings aside, of scripts and styles whose address begins with ``source``."""
        self.call("Marionette:SetContext", value="chrome")
        try:
            return self.run(ERRORS, source)
        finally:
            self.call("Marionette:SetContext", value="content")

    def close(self) -> None:
        try:
            self.call("Marionette:Quit", flags=["eForceQuit"])
            self.process.wait(20)
        finally:
            self.process.kill()
            self.socket.close()

    def _receive(self):
        head = b""
        while not head.endswith(b":"):
            head += self._bytes(1)
        return json.loads(self._bytes(int(head[:-1])))

    def _bytes(self, size: int) -> bytes:
        parts = []
        while size:
            parts.append(self.socket.recv(min(size, 1 << 20)))
            if not parts[-1]:
                raise RuntimeError("Firefox closed the connection")
            size -= len(parts[-1])
        return b"".join(parts)
