"""Headless Chromium, given what to do through the DevTools protocol over a pipe: no port, no network, a profile of its own."""

import base64
import json
import os
import shutil
import subprocess

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]
TROUBLE = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}


class Browser:
    """One page. trouble: errors and warnings that it logged; requested: addresses that it asked for."""

    def __init__(self, profile):
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            pytest.skip("needs chromium, see CONTRIBUTING.md")
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        renumbered = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", renumbered, program, *FLAGS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.reader, self.writer = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self.trouble, self.requested, self.count, self.session, self.events = [], [], 0, None, set()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self):
        self.reader.close()
        self.writer.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def send(self, method, **parameters):
        """Call a method and wait for what it returns."""
        self.count += 1
        session = {"sessionId": self.session} if self.session else {}
        message = {"id": self.count, "method": method, "params": parameters, **session}
        self.writer.write(json.dumps(message).encode() + b"\0")
        self.writer.flush()
        while (answer := self._read()).get("id") != self.count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path, width, dark=False):
        """Show a file at a width in CSS pixels, two device pixels each."""
        self.visit(path.resolve().as_uri(), width, dark)

    def visit(self, address, width, dark=False):
        """Show what is at an address, at such a width."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.send("Page.navigate", url=address)
        while "Page.loadEventFired" not in self.events:
            self._read()
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script):
        """What an expression, or its promise, gives."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key, text=""):
        """One key down and up."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text if kind == "keyDown" else "")

    def screenshot(self, path, whole=False):
        """What is to be seen, or the whole page, as PNG."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def _read(self):
        """The next message; events are taken note of."""
        text = bytearray()
        while (byte := self.reader.read(1)) != b"\0":
            assert byte, "chromium has ended"
            text += byte
        message = json.loads(text)
        method = message.get("method")
        self.events.add(method)
        if method in TROUBLE:
            self.trouble.append(message["params"])
        if method == "Network.requestWillBeSent":
            self.requested.append(message["params"]["request"]["url"])
        return message
