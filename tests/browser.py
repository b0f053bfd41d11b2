"""A headless Chromium, driven through its DevTools protocol over a pipe: real keys, taps, downloads and screenshots."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Backspace": 8, " ": 32, "Enter": 13}
# the browser reads commands from descriptor 3 and writes answers to 4
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(word), fcntl.F_DUPFD, 10) for word in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Refused(RuntimeError):
    """A command that the browser did not carry out, such as an evaluation in a page that is being left."""


class Page:
    """One tab."""

    def __init__(self, to_browser, from_browser):
        self._to, self._from, self._number, self._session, self._left = to_browser, from_browser, 0, None, b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """-> the result of a DevTools command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._left:
                if not select.select([self._from], [], [], 60)[0]:
                    raise TimeoutError(method)
                chunk = os.read(self._from, 1 << 16)
                if not chunk:
                    raise EOFError("the browser has ended")
                self._left += chunk
            text, _, self._left = self._left.partition(b"\0")
            answer = json.loads(text)
            if answer.get("method") == "Page.javascriptDialogOpening":
                raise RuntimeError(f"unexpected dialog: {answer['params']['message']}")
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise Refused(f"{method}: {answer['error']}")
                return answer["result"]

    def value(self, expression):
        """-> what a JavaScript expression gives, as JSON."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, expression, seconds=20):
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(Refused):
                if self.value(f"Boolean({expression})"):
                    return
            time.sleep(0.02)
        raise TimeoutError(expression)

    def open(self, path):
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def reload(self):
        self.value("window.before = true")
        self.call("Page.reload")
        self.wait("!window.before && document.readyState === 'complete'")

    def size(self, width, height, phone=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1,
                  mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def press(self, key):
        more = {"text": key} if key == " " else {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if more else "rawKeyDown", key=key,
                  windowsVirtualKeyCode=KEYS[key], **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=KEYS[key])

    def middle(self, selector):
        return self.value(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
                          f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())")

    def tap(self, selector):
        x, y = self.middle(selector)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def click(self, selector):
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def write(self, text):
        self.call("Input.insertText", text=text)

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


class NotStarted(RuntimeError):
    """The program on the PATH is no browser that runs here, such as the stub that only asks to install one."""


@contextmanager
def page(folder, *flags):
    """Yield a Page of a new browser; folder: for its profile, and (downloads/) for what it saves."""
    to_child, to_browser = os.pipe()
    from_browser, from_child = os.pipe()
    words = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
             f"--user-data-dir={folder / 'profile'}", *flags, "about:blank"]
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", START, str(to_child), str(from_child), *words],
                             pass_fds=(to_child, from_child), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(to_child)
    os.close(from_child)
    try:
        try:
            tab = Page(to_browser, from_browser)
        except (BrokenPipeError, EOFError) as error:
            raise NotStarted(f"{PROGRAM} has ended at once") from error
        (folder / "downloads").mkdir(exist_ok=True)
        tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder / "downloads"))
        yield tab
        tab.call("Browser.close")
        child.wait(20)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        os.close(to_browser)
        os.close(from_browser)
