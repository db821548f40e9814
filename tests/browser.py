"""browser.py - drives a Chromium by its debugging protocol over a pipe, with the standard library alone.

CHROME names its program; else one of the usual names is looked for. `npm install @sparticuz/chromium` brings one.
"""
import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell", "headless_shell")
ARGUMENTS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-zygote",
             "--single-process", "--hide-scrollbars", "--remote-debugging-pipe", "--no-first-run")


def program():
    """The browser's program, or None."""
    return os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser with one tab. use() says in which tab the others work."""

    def __init__(self, folder):
        """folder: an empty one, for its profile. Raises OSError where it does not start."""
        inward, self.commands = os.pipe()
        self.answers, outward = os.pipe()

        def place():                                        # the protocol's pipes are the descriptors 3 and 4
            os.dup2(os.dup(inward), 13), os.dup2(os.dup(outward), 14)
            os.dup2(13, 3), os.dup2(14, 4)
        self.process = subprocess.Popen([program(), *ARGUMENTS, f"--user-data-dir={folder}", "about:blank"],
                                        preexec_fn=place, pass_fds=(3, 4), stderr=subprocess.DEVNULL)
        os.close(inward), os.close(outward)
        self.number, self.rest, self.session, self.events = 0, b"", None, []
        self.session = self.open()

    def open(self):
        """A new tab; it is used from now on. Returns its session."""
        self.session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self.session

    def send(self, method, **params):
        """Calls a method of the protocol and waits for what it returns. What happens meanwhile is kept in events."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = os.read(self.answers, 1 << 20)
                if not part:
                    raise OSError("the browser has ended")
                self.rest += part
            first, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(first)
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def run(self, code):
        """The value of JavaScript, a promise awaited."""
        result = self.send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, code, seconds=10):
        """Waits for JavaScript to be true."""
        end = time.monotonic() + seconds
        while not self.run(code):
            assert time.monotonic() < end, f"still not: {code}"
            time.sleep(0.02)

    def goto(self, url):
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def key(self, name, code, text=""):
        """Presses and releases a key."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code,
                      **({"text": text} if text and kind == "keyDown" else {}))

    def look(self, width, height=900, scheme="light", phone=False):
        """The size of the window, and whether the system is light or dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.commands), os.close(self.answers)
