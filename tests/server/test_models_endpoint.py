"""Adapters are models of their own: listed, named by requests, and answering differently."""

from __future__ import annotations

import asyncio
from pathlib import Path

from in_process import Client, client_of

from adapters_made import write_made_adapter
from qwenkit.api import AsyncLLM


def test_adapters_are_named_as_models(tiny: Path, tmp_path: Path) -> None:
    async def run() -> None:
        async with AsyncLLM(tiny, threads=1, kv_cache_tokens=4096) as llm:
            for seed, name in enumerate(("law", "tales")):
                folder = write_made_adapter(tmp_path / name, llm.model, seed=seed)
                await llm.load_adapter(name, folder)
            async with client_of(llm) as client:
                await use(client)

    asyncio.run(run())


async def use(client: Client) -> None:
    listed = (await client.http.get("/v1/models")).json()["data"]
    assert [(model["id"], model["parent"]) for model in listed] == [
        *(("tiny", None), ("law", "tiny"), ("tales", "tiny"))
    ]
    assert (await client.http.get("/v1/models/law")).json()["root"] == "tiny"
    tags = (await client.http.get("/api/tags")).json()["models"]
    assert [tag["name"] for tag in tags] == ["tiny", "law", "tales"]
    answers = {}
    for name in ("tiny", "law", "tales", "default"):
        answer = (await client.chat(model=name, temperature=0, ignore_eos=True)).json()
        assert answer["model"] == ("tiny" if name == "default" else name)
        answers[name] = answer["choices"][0]["message"]["content"]
    assert len({answers["tiny"], answers["law"], answers["tales"]}) == 3
    assert answers["default"] == answers["tiny"]  # the model as it is
    unknown = await client.chat(model="tale")
    assert (unknown.status_code, "'tales'" in unknown.text) == (404, True)
