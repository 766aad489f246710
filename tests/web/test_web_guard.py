"""The door of the page: who comes in, by what name, to which paths; what every answer says."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from qwenkit.web.guard import Admission, Guard, content_security_policy, host_name

PAGE = (
    b'<html><head><meta property="og:image" content="https://outside/x.png"/></head>'
    b"<body><script>a</script><script type=module src=./b.js></script></body></html>"
)
OPEN = Admission(hosts={"127.0.0.1", "localhost", "[::1]"}, users={})
LOCKED = Admission(hosts=None, users={"me": "sesame:open", "你": "好"})


class Inside:
    """What the guard protects: answers everything, in two pieces, and remembers what came."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        if scope["method"] == "POST":
            body, more = b"", True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body, more = body + message.get("body", b""), message.get("more_body", False)
            self.bodies.append(body)
        headers = [(b"content-type", b"text/html"), (b"content-length", b"%d" % len(PAGE))]
        headers.append((b"content-security-policy", b"default-src *"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": PAGE[:50], "more_body": True})
        await send({"type": "http.response.body", "body": PAGE[50:]})


def ask(
    path: str = "/",
    *,
    admission: Admission = OPEN,
    method: str = "GET",
    body: tuple[bytes, ...] = (b"",),
    inside: Inside | None = None,
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one request; headers are given with _ for -."""
    sent: list[MutableMapping[str, Any]] = []
    given = {"host": "127.0.0.1:7860", **{k.replace("_", "-"): v for k, v in headers.items()}}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(k.encode(), v.encode()) for k, v in given.items()],
    }
    pieces = list(body)

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(Guard(inside or Inside(), admission)(scope, receive, send))
    if not sent:
        return 0, {}, b""
    answered = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], answered, b"".join(m.get("body", b"") for m in sent[1:])


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def test_the_page_gets_our_files_and_only_its_own_scripts_run() -> None:
    status, headers, body = ask("/")
    assert status == 200
    assert int(headers["content-length"]) == len(body)
    nonces = set(re.findall(rb'<script nonce="([^"]+)"', body))
    assert len(nonces) == 1
    assert body.count(b"<script") == body.count(b"nonce=") == 3
    nonce = nonces.pop().decode()
    assert headers["content-security-policy"] == content_security_policy(nonce)
    assert b"page.js" in body
    assert b"page.css" in body
    assert b"outside" not in body
    assert nonce not in ask("/")[1]["content-security-policy"]


def test_the_policy_allows_nothing_from_outside_and_nothing_compiled() -> None:
    policy = content_security_policy("n")
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split("; ")}
    assert rules["default-src"] == ["'none'"]
    assert rules["script-src"] == ["'self'", "'nonce-n'"]
    assert "unsafe-eval" not in policy
    allowed = {word for words in rules.values() for word in words}
    assert allowed == {"'none'", "'self'", "'nonce-n'", "'unsafe-inline'", "data:"}
    assert [name for name, words in rules.items() if "'unsafe-inline'" in words] == ["style-src"]
    assert {name for name, words in rules.items() if "data:" in words} == {"img-src", "font-src"}


def test_every_answer_has_the_headers() -> None:
    for path in ("/", "/config", "/page.js", "/nowhere"):
        headers = ask(path)[1]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "default-src *" not in headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd", "/gradio_api/upload", "/gradio_api/proxy=http://x",
        "/file=/etc/passwd", "/docs", "/openapi.json", "/gradio_api/call/send", "/gradio_api/info",
        "/assets/../../secret", "/assets/..%2f", "/static/img/../../../x", "/monitoring", "/login",
        "/gradio_api/queue/join/x", "/gradio_api/run/send", "/theme.css/x", "//evil", "",
    ],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_there(path: str) -> None:
    inside = Inside()
    assert ask(path, inside=inside)[0] == 404
    assert inside.paths == []


@pytest.mark.parametrize(
    "path",
    ["/", "/config", "/theme.css", "/assets/index-D_1.js", "/assets/x@2.woff2",
     "/static/js/iframeResizer.contentWindow.min.js", "/gradio_api/queue/join",
     "/gradio_api/heartbeat/abc123"],
)  # fmt: skip
def test_what_the_page_needs_is_there(path: str) -> None:
    assert ask(path)[0] == 200


def test_our_own_files_are_served() -> None:
    for path, kind in (
        ("/page.js", "text/javascript"),
        ("/page.css", "text/css"),
        ("/favicon.ico", "image/svg"),
    ):
        status, headers, body = ask(path)
        assert status == 200
        assert headers["content-type"].startswith(kind)
        assert body


def test_other_names_and_other_sites_are_refused() -> None:
    assert ask(host="evil.example:7860")[0] == 421
    assert ask(host="127.0.0.1.evil.example")[0] == 421
    assert ask(host="LOCALHOST:1")[0] == 200
    assert ask(host="[::1]:7860")[0] == 200
    assert ask(admission=Admission(hosts=None, users={}), host="any.example")[0] == 200
    assert ask(method="POST", origin="https://evil.example")[0] == 403
    assert ask(method="POST", origin="null")[0] == 403
    assert ask(method="POST", origin="http://127.0.0.1:7861")[0] == 403
    assert ask(method="POST", origin="http://127.0.0.1:7860")[0] == 200
    assert ask(method="PUT")[0] == 405


def test_a_host_name_is_read_without_its_port() -> None:
    assert [host_name(h) for h in ("a:1", "a", "[::1]:80", "[::1]")] == ["a", "a", "[::1]", "[::1]"]


def test_a_password_is_asked_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenkit.web.guard._WRONG_PASSWORD_S", 0)
    for path in ("/", "/config", "/page.js", "/gradio_api/queue/join"):
        inside = Inside()
        status, headers, _ = ask(path, admission=LOCKED, inside=inside)
        assert (status, inside.paths) == (401, [])
        assert headers["www-authenticate"].startswith("Basic")
        assert ask(path, admission=LOCKED, authorization=basic("me", "sesame:open"))[0] == 200
    assert ask(admission=LOCKED, authorization=basic("你", "好"))[0] == 200
    for wrong in (
        *(basic(*pair) for pair in (("me", "sesame"), ("me", ""), ("", ""), ("you", ""))),
        basic("you", "sesame:open"),
        basic("me", "sesame:open") + "x",
        "Basic " + base64.b64encode(b"me").decode(),
        "Basic !",
        "Basic",
        "Basic \x00",
        "Bearer sesame",
    ):
        assert ask(admission=LOCKED, authorization=wrong)[0] == 401


def test_a_body_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenkit.web.guard._LARGEST_BODY", 10)
    join = "/gradio_api/queue/join"
    assert ask(join, method="POST", content_length="11")[0] == 413
    assert ask(join, method="POST", content_length="-1")[0] == 413
    inside = Inside()
    assert ask(join, method="POST", body=(b"123456", b"123456"), inside=inside)[0] == 0
    assert inside.bodies == []
    ask(join, method="POST", body=(b"12345", b"12345"), inside=inside)
    assert inside.bodies == [b"1234512345"]


def test_no_outside_address_stands_in_our_own_files() -> None:
    folder = Path(__file__).parents[2] / "src" / "qwenkit" / "web"
    for name in ("page.js", "page.css", "page.svg"):
        text = (folder / name).read_text(encoding="utf-8")
        text = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|//cdn", text)
    script = (folder / "page.js").read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", script
    )
