"""Who is let in: keys, hosts, origins, paths; and how much may come, in which time."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from in_process import HELLO, Client, asked

from qwenkit.server.settings import Access, ServerSettings

KEY, OTHER = "sk-the-key", "sk-another"
USER = ("me", "pass:word")  # the original cut a password at its colon
BASIC = "Basic " + base64.b64encode(b"me:pass:word").decode()
KEYED = ServerSettings(
    names=("tiny",), access=Access(api_keys=(KEY, OTHER), users=(USER,)), allow_priority=False
)
HOST = ("host", "127.0.0.1:8000")
BODY = json.dumps({"messages": HELLO, "max_tokens": 1}).encode()

PATHS = [
    *(("GET", path) for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/docs")),
    *(("GET", path) for path in ("/openapi.json", "/api/tags", "/api/version", "/api/ps", "/")),
    *(("POST", path) for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")),
    *(("POST", path) for path in ("/v1/responses", "/tokenize", "/detokenize", "/api/chat")),
    *(("POST", path) for path in ("/api/generate", "/api/show", "/api/embed")),
    *(("GET", path) for path in ("//v1/models", "/V1/models", "/v1/models/", "/v1//models")),
    *(("GET", path) for path in ("/v1/./models", "/health/../v1/models", "/health/", "/Health")),
    *(("GET", path) for path in ("//health", "/health/x", "/ready/", "/nothing")),
    *((method, "/health") for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE")),
]


def test_nothing_but_health_answers_without_a_key(tiny: Path) -> None:
    async def use(client: Client) -> None:
        for method, path in PATHS:
            for wrong in (None, "Bearer", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"bearer{KEY}",
                          "Bearer ", f"Basic {KEY}", "Basic !", f"Token {KEY}", "x" * 9000,
                          "Basic " + base64.b64encode(b"me:pass").decode()):  # fmt: skip
                headers = [HOST] + ([] if wrong is None else [("authorization", wrong)])
                answer = await client.raw(method, path, headers, [BODY])
                assert answer.status == 401, (method, path, wrong, answer)
                assert answer.headers["www-authenticate"].startswith("Bearer, Basic")
                assert answer.received <= 1  # its body is not read, but for what was on the way
        for path in ("/health", "/ready"):
            for method in ("GET", "HEAD"):
                assert (await client.raw(method, path, [("host", "any.example")])).status == 200

    asked(tiny, use, KEYED)


def test_every_key_and_password_lets_in(tiny: Path) -> None:
    async def use(client: Client) -> None:
        for good in (f"Bearer {KEY}", f"bearer   {OTHER}", BASIC):
            answer = await client.raw("GET", "/v1/models", [HOST, ("authorization", good)])
            assert answer.status == 200
            assert KEY.encode() not in answer.body
        twice = [HOST, ("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")]
        assert (await client.raw("GET", "/v1/models", twice)).status == 401

    asked(tiny, use, KEYED)


def test_keys_share_no_cache_and_may_not_push_in(tiny: Path) -> None:
    async def use(client: Client) -> None:
        async def ask(key: str, **fields: Any) -> Any:
            headers = [HOST, ("authorization", f"Bearer {key}")]
            body = {"messages": [{"role": "user", "content": "Hello " * 20}], "max_tokens": 1}
            pieces = [json.dumps(body | fields).encode()]
            return json.loads(
                (await client.raw("POST", "/v1/chat/completions", headers, pieces)).body
            )

        cached = [
            (await ask(key))["usage"]["prompt_tokens_details"]["cached_tokens"]
            for key in (KEY, KEY, OTHER, OTHER)
        ]
        assert [count > 0 for count in cached] == [False, True, False, True]
        assert (await ask(KEY, priority=1))["error"]["param"] == "priority"
        assert "usage" in await ask(KEY, priority=-1)

    asked(tiny, use, KEYED)


@pytest.mark.parametrize(
    ("hosts", "status"),
    [
        (["127.0.0.1:8000"], 200),
        (["localhost"], 200),
        (["LOCALHOST:1"], 200),
        (["[::1]:8000"], 200),
        (["192.168.1.7"], 200),
        (["chat.example.com:8000"], 200),
        (["evil.example"], 421),
        (["localhost.evil.example"], 421),
        (["chat.example.com@evil.example"], 400),
        (["localhost/evil"], 400),
        (["local host"], 400),
        (["localhost:port"], 400),
        ([""], 400),
        ([], 400),
        (["localhost", "localhost"], 400),
    ],
)
def test_only_names_of_the_server_are_answered(tiny: Path, hosts: list[str], status: int) -> None:
    settings = ServerSettings(names=("tiny",), access=Access(hosts=("chat.example.com",)))

    async def use(client: Client) -> None:
        answer = await client.raw("GET", "/v1/models", [("host", host) for host in hosts])
        assert answer.status == status, answer.body
        if status == 421:
            assert b"--allowed-host" in answer.body

    asked(tiny, use, settings)


def test_pages_of_other_places_are_kept_out(tiny: Path) -> None:
    good, settings = (
        "https://chat.example.com",
        ServerSettings(names=("tiny",), access=Access(origins=("https://chat.example.com/",))),
    )

    async def use(client: Client) -> None:
        async def ask(origin: str, *more: tuple[str, str], method: str = "POST") -> Any:
            headers = [HOST, ("origin", origin), *more]
            return await client.raw(method, "/v1/chat/completions", headers, [BODY])

        for foreign in ("https://evil.example", "null", "http://localhost:8000", "https://chat"):
            refused = await ask(foreign)
            assert refused.status == 403
            assert "access-control-allow-origin" not in refused.headers
            wanted = ("access-control-request-method", "POST")
            assert (await ask(foreign, wanted, method="OPTIONS")).status == 403
        same = await ask("http://127.0.0.1:8000")  # a page of this server itself
        assert (same.status, "access-control-allow-origin" in same.headers) == (200, False)
        allowed = await ask(good)
        assert (allowed.status, allowed.headers["access-control-allow-origin"]) == (200, good)
        asks = ("access-control-request-method", "POST")
        names = ("access-control-request-headers", "authorization, x-stainless-os")
        before = await ask(good, asks, names, method="OPTIONS")
        assert (before.status, before.body) == (204, b"")
        assert before.headers["access-control-allow-headers"] == names[1]
        assert before.headers["access-control-allow-origin"] == good

    asked(tiny, use, settings)


def test_a_preflight_needs_no_key_and_answers_nothing_else(tiny: Path) -> None:
    access = Access(api_keys=(KEY,), origins=("*",))

    async def use(client: Client) -> None:
        asks = ("access-control-request-method", "POST")
        headers = [HOST, ("origin", "https://a.example"), asks]
        assert (await client.raw("OPTIONS", "/v1/models", headers)).status == 204
        assert (await client.raw("OPTIONS", "/v1/models", headers[:2])).status == 401
        refused = await client.raw("GET", "/v1/models", headers[:2])
        assert refused.status == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"

    asked(tiny, use, ServerSettings(names=("tiny",), access=access))


def test_bodies_are_bounded_in_size_and_time(tiny: Path) -> None:
    settings = ServerSettings(names=("tiny",), max_body_bytes=1000, body_timeout_s=0.2)
    path = "/v1/chat/completions"

    async def use(client: Client) -> None:
        said = await client.raw("POST", path, [HOST, ("content-length", "1001")], [b"a"] * 99)
        assert (said.status, json.loads(said.body)["error"]["code"]) == (413, "body_too_large")
        assert said.headers["connection"] == "close"
        for length in ("9" * 400, "1000"):  # and one that lies
            answer = await client.raw("POST", path, [HOST, ("content-length", length)], [BODY])
            assert answer.status in (200, 413)
        unsaid = await client.raw("POST", path, pieces=[b"a" * 1_000_000] * 50)
        assert (unsaid.status, unsaid.received < 10) == (413, True)
        slow = await client.raw("POST", path, pieces=[b"a"] * 50, pause_s=0.05)
        assert slow.status == 408
        packed = await client.raw("POST", path, [HOST, ("content-encoding", "gzip")], [BODY])
        assert packed.status == 415
        gone = await client.raw("POST", "/nothing", pieces=[b"a" * 400] * 50)
        assert (gone.status, gone.received < 5) == (404, True)
        big = [HOST, ("x-a", "a" * 20_000), ("x-b", "b" * 20_000)]
        assert (await client.raw("GET", "/v1/models", big)).status == 431
        assert (await client.raw("GET", "/health", big)).status == 431
        assert (await client.raw("GET", "/" + "a" * 40_000)).status == 431

    asked(tiny, use, settings)


def test_request_ids_come_back(tiny: Path) -> None:
    async def use(client: Client) -> None:
        given = await client.raw("GET", "/health", [("x-request-id", "mine-1")])
        assert given.headers["x-request-id"] == "mine-1"
        for bad in ("a b", "", "x" * 129, "é"):
            answer = await client.raw("GET", "/health", [("x-request-id", bad)])
            assert answer.headers["x-request-id"].startswith("req_")
        refused = await client.raw("GET", "/nothing", [HOST])
        assert refused.headers["x-request-id"].startswith("req_")

    asked(tiny, use)


def test_content_of_any_type_is_read_as_json(tiny: Path) -> None:
    async def use(client: Client) -> None:
        for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
            headers = [HOST, ("content-type", kind)]
            answer = await client.raw("POST", "/v1/chat/completions", headers, [BODY[:9], BODY[9:]])
            assert answer.status == 200
        assert (await client.raw("POST", "/v1/chat/completions", pieces=[BODY])).status == 200

    asked(tiny, use)
