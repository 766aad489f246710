"""Row 18: every route without its key, under foreign names, and from foreign pages."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import qwenkit
from qwenkit.bench.http_client import Connection, Header, Target, ask
from qwenkit.bench.reliability.board import KEY, Board
from qwenkit.bench.reliability.spec import Row, Tally
from qwenkit.bench.reliability.wire import CHAT
from qwenkit.bench.server_process import ServerProcess, free_port, own_address, own_command

OPEN = {("GET", "/health"), ("GET", "/ready")}  # what may answer without a key
_CHECKERS = ("compare_digest",)
_MOST_T = 4.5
_ODD_HOSTS = (
    "localhost.evil.example",
    "evil.example",
    "169.254.169.254.nip.io",
    "x/health",
    "x?/health",
    "x#",
    "[::1",
    "127.0.0.1@evil.example",
)


async def run(board: Board, tally: Tally) -> None:
    """Keys, hosts, origins, addresses, and the time that a comparison takes."""
    async with board.new_server() as server:
        keyed = server.target
        keyless = Target(host=keyed.host, port=keyed.port)
        await _routes(keyed, keyless, tally)
        await _hosts_and_origins(keyed, tally)
        board.say("row 18, timing of the key")
        await _timing(keyless, tally, board.pick(1500, 10_000))
        board.measure(tally)
    await _addresses(board, tally)
    source = Path(qwenkit.__file__).with_name("server") / "auth.py"
    text = source.read_text(encoding="utf-8") if source.exists() else ""
    tally.check("keys are compared in constant time", all(c in text for c in _CHECKERS), source)


async def _routes(keyed: Target, keyless: Target, tally: Tally) -> None:
    schema = await ask(keyed, "/openapi.json", method="GET")
    paths = (schema.json() or {}).get("paths", {})
    tally.check("the routes are known", bool(paths), schema.shown)
    listed = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    listed |= {("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/metrics"), ("GET", "/")}
    for method, template in sorted(listed):
        path = template.replace("{", "").replace("}", "")
        body = b"{}" if method in ("POST", "PUT", "PATCH") else None
        for name, headers in _wrong_keys():
            answer = await ask(keyless, path, body, method=method, headers=headers)
            tally.took(answer.seconds)
            is_open = (method, template) in OPEN
            fits = answer.status == 200 if is_open else answer.status == 401
            given = {"method": method, "path": path, "headers": [list(h) for h in headers]}
            tally.check(f"{method} {path}, {name}", fits, answer.shown, given)
        if (method, template) in OPEN:
            continue
        for odd in _odd_paths(path):
            answer = await ask(keyless, odd, body, method=method)
            given = {"method": method, "path": odd}
            tally.check(f"{method} {odd}", answer.status in (400, 401, 404), answer.shown, given)
        for host in _ODD_HOSTS:
            answer = await ask(keyless, path, body, method=method, headers=(("Host", host),))
            given = {"method": method, "path": path, "host": host}
            fits = answer.status in (400, 401, 403, 421)
            tally.check(f"{method} {path}, host {host}", fits, answer.shown, given)


def _wrong_keys() -> Iterator[tuple[str, tuple[Header, ...]]]:
    yield "no key", ()
    for name, value in (
        ("a wrong key", "Bearer wrong"),
        ("the key's beginning", f"Bearer {KEY[:-1]}"),
        ("more than the key", f"Bearer {KEY}x"),
        ("an empty key", "Bearer "),
        ("the key in capitals", f"Bearer {KEY.upper()}"),
        ("the key as a name and password", f"Basic {KEY}"),
        ("the key alone", KEY),
    ):
        yield name, (("Authorization", value),)
    yield "two keys", (("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {KEY}"))


def _odd_paths(path: str) -> Iterator[str]:
    yield f"/{path}"
    yield f"{path}/"
    yield path.upper() if path.upper() != path else f"{path}?x=1"
    yield f"/health/..{path}"
    yield f"/health;{path}"
    yield path.replace("/", "/%2e/", 1)
    yield f"{path}?path=/health"


async def _hosts_and_origins(keyed: Target, tally: Tally) -> None:
    for host in _ODD_HOSTS:
        answer = await ask(keyed, "/v1/models", method="GET", headers=(("Host", host),))
        fits = 400 <= answer.status < 500
        tally.check(f"a foreign host, {host}", fits, answer.shown)
    for origin in ("https://evil.example", "null", f"http://{keyed.host}:{keyed.port + 1}"):
        preflight = (("Origin", origin), ("Access-Control-Request-Method", "POST"))
        answer = await ask(keyed, CHAT, method="OPTIONS", headers=preflight)
        let_in = answer.headers.get("access-control-allow-origin") in ("*", origin)
        tally.check(f"a page of {origin} asks whether it may", not let_in, answer.headers)
        plain = await ask(keyed, "/v1/models", method="GET", headers=(("Origin", origin),))
        let_in = plain.headers.get("access-control-allow-origin") in ("*", origin)
        tally.check(f"a page of {origin} asks", not let_in, plain.headers)


async def _timing(keyless: Target, tally: Tally, count: int) -> None:
    """Whether a key that begins rightly takes longer to be refused: Welch's t of both."""
    near, far = KEY[:-1] + "x", "x" * len(KEY)
    times: dict[str, list[float]] = {near: [], far: []}
    connection = await Connection.open(keyless)
    for turn in range(2 * count):
        key = (near, far)[turn % 2]
        start_s = time.perf_counter()
        await connection.send("GET", "/v1/models", None, (("Authorization", f"Bearer {key}"),))
        await connection.read_head()
        await connection.read_body()
        times[key].append(time.perf_counter() - start_s)
    connection.close()
    t = welch_t(times[near], times[far])
    tally.figures["t of the key's timing"] = round(t, 2)
    tally.check("the key's timing", abs(t) < _MOST_T, f"t = {t:.2f}")


def welch_t(one: list[float], other: list[float]) -> float:
    """Welch's t of two samples, of each the fastest nine tenths: what a busy machine adds is no
    property of the server.
    """
    kept = [sorted(sample)[: len(sample) * 9 // 10] for sample in (one, other)]
    means = [statistics.fmean(sample) for sample in kept]
    errors = [statistics.variance(sample) / len(sample) for sample in kept]
    return (means[0] - means[1]) / math.sqrt(sum(errors))


async def _addresses(board: Board, tally: Tally) -> None:
    """Loopback is the default; beyond it a start without a key is refused."""
    port = free_port()
    target = Target(host="127.0.0.1", port=port)
    command = own_command(board.model, port)
    where = command.index("--host")
    with ServerProcess([*command[:where], *command[where + 2 :]], target) as server:
        await server.wait_until_ready()
        own = await _is_reachable(Target(host=own_address(), port=port))
        tally.check("the default is loopback", not own, "it listens on other addresses too")
    public = [*command[: where + 1], "0.0.0.0", *command[where + 2 :]]
    with ServerProcess(public, target) as server:
        status = server.wait(60.0)
        refused = status not in (None, 0)
        tally.check("a public address without a key", refused, f"status {status}")


async def _is_reachable(target: Target) -> bool:
    try:
        (await Connection.open(target)).close()
    except OSError:
        return False
    return True


ROW = Row(
    id=18,
    promise="only the health routes answer without the key, by no name or path; no page is let in",
    run=run,
)
