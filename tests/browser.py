"""A headless Chromium for the tests, spoken to over a pipe in its DevTools protocol
(https://chromedevtools.github.io/devtools-protocol/): nothing to install besides the browser.

Run: python tests/browser.py page.html picture.png    a picture of a page as it opens
"""
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find():
    """The path of a browser, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser of its own, in a folder for its profile. `said` holds what was written
    to its console or went wrong in a script, `asked` the addresses that it asked for."""

    def __init__(self, folder):
        to_browser, our_end = os.pipe()
        our_ear, from_browser = os.pipe()
        # the browser reads its file 3 and writes to its file 4
        command = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                    "--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={folder}"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", find(), *switches],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.out = open(our_end, "wb", buffering=0)
        self.ear = open(our_ear, "rb", buffering=0)
        self.unread = b""
        self.number = 0
        self.said, self.asked, self.loaded = [], [], False
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target,
                                 flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.call("Browser.close")
        self.out.close()
        self.ear.close()
        self.process.wait(timeout=20)

    def call(self, method, **params):
        """What a command of the protocol returns. RuntimeError if it refuses."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self.listen()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def listen(self):
        """The next message; events are noted."""
        while b"\0" not in self.unread:
            piece = self.ear.read(2**20)
            if not piece:
                raise OSError("the browser has ended")
            self.unread += piece
        text, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.said.append(params["exceptionDetails"])
        elif method == "Log.entryAdded":
            self.said.append(params["entry"])
        elif method == "Runtime.consoleAPICalled":
            self.said.append([arg.get("value") for arg in params["args"]])
        elif method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True
        return message

    def look(self, width, height, dark=False, phone=False):
        """How large the window is, and what the page's owner likes."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, address):
        self.loaded = False
        self.call("Page.navigate", url=address)
        while not self.loaded:
            self.listen()

    def run(self, script):
        """The value of an expression in the page, as JSON has it; a promise's is waited for."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                         awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"])
        return done["result"].get("value")

    def until(self, script, seconds=90):
        """Waits for an expression in the page to be true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds} s: {script}; said: {self.said}")
            time.sleep(0.05)

    def screenshot(self, path):
        shot = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    page, picture = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder, Browser(folder) as browser:
        browser.look(1100, 1400)
        browser.open(f"file://{page.resolve()}")
        browser.until("document.querySelector('.plot .main-svg') !== null")
        browser.screenshot(picture)
