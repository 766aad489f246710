"""The chat page as its users have it: a real process, in a real browser.

The page's process says which addresses it asks for; the browser says what it requests, and whether
a script ran that should not have.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT_MS = 30_000
# A text that a careless page would change.
RAW = '<b>1 < 2 &amp; "q"</b> **x** $y$ `z`\n\t\\(a\\) 100 % 你好'

# Every address that the process looks up or connects to is written to the file in the first word.
_WATCHED = """
import sys
log = open(sys.argv.pop(1), "a", buffering=1)
def watch(event, args):
    if event == "socket.connect":
        log.write(f"{args[1][0] if isinstance(args[1], tuple) else args[1]}\\n")
    elif event == "socket.getaddrinfo":
        log.write(f"{args[0]}\\n")
sys.addaudithook(watch)
from qwenkit.cli.main import main
main()
"""

# Set before any script of the page: counts what its policy had to stop.
_WATCHER = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""


@contextmanager
def running_page(folder: Path, *arguments: str) -> Iterator[str]:
    """`qwenkit` with `arguments` that open a chat page; gives its address.

    What the process asked for stands in `folder`/asked.txt.
    """
    command = [sys.executable, "-c", _WATCHED, str(folder / "asked.txt"), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    try:
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"chat page is at (http://[\d.]+:\d+/)", line):
                break
        else:
            raise AssertionError(f"the page never opened:\n{said}")
        threading.Thread(target=_drain, args=(process.stderr,), daemon=True).start()
        yield found[1]
        process.terminate()
        process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
        process.wait()


def _drain(stream: Any) -> None:
    """Read `stream` to its end, so that nobody waits to write to it."""
    with stream:
        stream.read()


class Outside:
    """An address that nothing may ask: `asked` holds the paths of those who did."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_error(404)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def browser() -> Iterator[Any]:
    """Debian's Chromium. Skips where it is not."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian's package chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM)
        yield opened
        opened.close()


class Chat:
    """One tab with the page: what a person does with it, and what it must never do."""

    def __init__(self, context: Any, address: str) -> None:
        self.address = address
        self.requested: list[str] = []
        self.errors: list[str] = []
        self.console: list[str] = []  # errors that Gradio caught; not all are faults
        self.loads = 0  # more than `open` has asked for: Gradio loads the page anew by itself
        context.add_init_script(_WATCHER)
        self.page = context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.page.on("request", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("domcontentloaded", lambda _: self._loaded())
        self.page.on("console", self._listen)
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}"))
        self.open()

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.requested.append(request.url)

    def _loaded(self) -> None:
        self.loads += 1

    def _listen(self, message: Any) -> None:
        if message.type == "error":
            self.console.append(message.text[:300])

    def open(self) -> None:
        """Load the page, or load it again."""
        self.page.goto(self.address)
        self.page.wait_for_selector("body.q-ready")
        self.page.wait_for_function(
            "() => document.querySelector('#q-current input')?.value.length > 10"
        )

    def write(self, text: str) -> None:
        """Put `text` into the box, as if it were pasted."""
        self.page.evaluate(
            """(text) => {
                const box = document.querySelector("#q-message textarea");
                box.focus();
                box.value = text;
                box.dispatchEvent(new Event("input", { bubbles: true }));
            }""",
            text,
        )

    def say(self, text: str, *, wait: bool = True) -> None:
        """Send `text`, and wait until the answer is complete."""
        before = self.revision
        self.write(text)
        self.page.locator("#q-message textarea").press("Enter")
        if wait:
            self.wait_for_answer(before)

    @property
    def conversation(self) -> dict[str, Any]:
        """The conversation that the page holds."""
        value = self.page.evaluate("document.querySelector('#q-current input').value")
        held: dict[str, Any] = json.loads(value)
        return held

    @property
    def revision(self) -> int:
        """It grows with every change."""
        return int(self.conversation["revision"])

    @property
    def texts(self) -> list[str]:
        """What was said, turn by turn."""
        return [turn.get("text", "") for turn in self.conversation["turns"]]

    def wait_for_answer(self, before: int) -> None:
        """Until the box takes a message again and more has been said than at revision `before`."""
        self._wait(
            """(before) => {
                const written = document.querySelector("#q-current input").value;
                if (!written) return false;
                const held = JSON.parse(written);
                const isReady = document.querySelector("#q-message .submit-button");
                const isComing = document.querySelector("#q-live .q-coming");
                return held.revision > before + 1 && isReady && !isComing;
            }""",
            before,
        )

    def expect_texts(self, texts: list[str]) -> None:
        """That is what was said, or will be in a moment: fields are drawn one by one."""
        self._expect(lambda: self.texts, texts)

    def expect_box(self, text: str) -> None:
        """That is what is written in the box, at the latest in a moment."""
        self._expect(lambda: self.page.input_value("#q-message textarea"), text)

    def _expect(self, read: Callable[[], Any], expected: Any) -> None:
        for _ in range(WAIT_MS // 50):
            if read() == expected:
                return
            self.page.wait_for_timeout(50)
        assert read() == expected

    def _wait(self, script: str, number: int) -> None:
        """Until `script` of `number` is true; what the page says then is in the error."""
        from playwright.sync_api import TimeoutError as TooLongError

        try:
            self.page.wait_for_function(script, arg=number)
        except TooLongError as error:
            raise AssertionError(f"{number=} {self._state()}") from error

    def _state(self) -> str:
        """What a person who looks for a fault wants to know: fields may be empty or half drawn."""
        fields = {
            "conversation": "#q-current input",
            "box": "#q-message textarea",
            "note": "#q-note",
            "signal": "#q-signal",
            "page": "body",
        }
        found = self.page.evaluate(
            """(fields) => fields.map((field) => {
                const part = document.querySelector(field);
                const text = part?.value ?? (field === "body" ? part.innerText : part?.textContent);
                return text?.length > 1000 ? text.slice(0, 500) + " … " + text.slice(-500) : text;
            })""",
            list(fields.values()),
        )
        said = dict(zip(fields, found, strict=True))
        said |= {"loads": self.loads, "console": self.console[-5:], "errors": self.errors[-5:]}
        return " ".join(f"{name}={value!r}" for name, value in said.items())

    def wait_for_text(self, selector: str, text: str) -> None:
        """Until what `selector` finds holds `text`."""
        self.page.locator(selector).filter(has_text=text).first.wait_for()

    def check_harmless(self, place: str = "") -> None:
        """No script ran that is not the page's, nothing was stopped, and nothing outside asked."""
        assert self.page.evaluate("window.hacked") is None, place
        assert self.page.evaluate("window.violations") == [], place
        assert self.requested == [], place
        assert self.errors == [], place
        links = self.page.evaluate("[...document.links].map((link) => link.protocol)")
        assert set(links) <= {"http:", "https:", "mailto:"}, place
        assert (
            self.page.evaluate(
                "[...document.querySelectorAll('#q-past *, #q-live *')].filter((e) => "
                "e.matches('script,style,iframe,object,embed,img,video,audio,form,input,link,meta,base')"
                " || [...e.attributes].some((a) => a.name.startsWith('on')))"
                ".map((e) => e.outerHTML.slice(0, 200))"
            )
            == []
        ), place
