"""No request ends the server, is answered with a 5xx, or changes what its neighbours get."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from hostile import CASES
from in_process import Client, asked

FINE = frozenset((200, 400, 404, 405, 413))


def test_hostile_requests_amid_live_streams(tiny: Path) -> None:
    async def use(client: Client) -> None:
        def victim(seed: int) -> asyncio.Task[str]:
            fields = {"seed": seed, "max_tokens": 25, "ignore_eos": True, "logprobs": True}
            return asyncio.create_task(text(client.chat(**fields)))

        async def text(answer: object) -> str:
            whole = (await answer).json()  # type: ignore[misc]
            return json.dumps(whole["choices"])

        alone = [await victim(seed) for seed in range(4)]
        victims = [victim(seed) for seed in range(4)]
        found: list[tuple[int, str]] = []
        for path, body in CASES:
            answer = await client.post(path, body)
            assert answer.status_code in FINE, (path, str(body)[:200], answer.text[:300])
            if answer.status_code == 200:
                continue
            error = answer.json()["error"]
            assert error if path.startswith("/api") else error["message"], answer.text
            victims.append(victim(len(victims) % 4))
        found = await asyncio.gather(*victims)
        assert [one == alone[place % 4] for place, one in enumerate(found)] == [True] * len(found)
        assert (await client.http.get("/health")).status_code == 200
        status = client.served.llm.status()
        assert (status.running, status.waiting) == (0, 0)
        assert status.free_blocks == status.total_blocks

    asked(tiny, use)


def test_there_are_about_a_hundred() -> None:
    assert len(CASES) >= 95
