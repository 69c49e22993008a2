"""A browser without a window, driven through a pipe by the DevTools protocol: real keys, touches and downloads."""

import itertools
import json
import os
import select
import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEYS = {"Enter": 13, "Backspace": 8, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39}
CONTROL = 2
FAULTS = ("Runtime.exceptionThrown", "Log.entryAdded")  # the latter says, for example, what a page may not load
PATIENCE = 60  # s without an answer


class Browser:
    """One page of a new browser. https://chromedevtools.github.io/devtools-protocol/."""

    def __init__(self, profile: Path):
        requests, self.requests = os.pipe()
        self.answers, answers = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        options += [f"--user-data-dir={profile}", "--disable-background-networking", "about:blank"]
        # The browser reads from file descriptor 3 and writes to 4.
        command = ["bash", "-c", f'exec "$@" 3<&{requests} 4>&{answers}', "browser", CHROMIUM, *options]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(requests, answers), **pipes)
        os.close(requests)
        os.close(answers)
        self.numbers, self.buffer, self.session = itertools.count(1), b"", None
        self.events = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.requests, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self):
        while b"\0" not in self.buffer:
            assert select.select([self.answers], [], [], PATIENCE)[0], "no answer from the browser"
            piece = os.read(self.answers, 2**16)
            assert piece, "the browser has ended"
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        answer = json.loads(message)
        assert answer.get("method") not in FAULTS, answer
        return answer

    def wait(self, event: str, **parameters):
        """Waits for this event with these parameters, which must not have come before `events` was cleared."""
        while not any(e["method"] == event and parameters.items() <= e["params"].items() for e in self.events):
            self.events.append(self.read())

    def open(self, path: Path):
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")

    def reload(self):
        self.events.clear()
        self.call("Page.reload")
        self.wait("Page.loadEventFired")

    def run(self, script: str):
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, *keys: str, modifiers: int = 0):
        for key in keys:
            code = KEYS.get(key, ord(key[0].upper()))
            event = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
            if len(key) == 1:
                event |= {"code": f"Digit{key}" if key.isdigit() else f"Key{key.upper()}" if key.isalpha() else ""}
            text = {} if modifiers or len(key) > 1 and key != "Enter" else {"text": "\r" if key == "Enter" else key}
            self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, element: str):
        """Clicks with the mouse on the first element that this CSS selector finds."""
        box = self.run(f"JSON.parse(JSON.stringify(document.querySelector({element!r}).getBoundingClientRect()))")
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **place)

    def type(self, text: str):
        self.call("Input.insertText", text=text)

    def close(self):
        self.session = None
        self.call("Browser.close")
        self.process.wait(PATIENCE)
        os.close(self.requests)
        os.close(self.answers)
