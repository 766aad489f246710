"""What the requests of a batch may demand of JSON: the refusals that the documentation names."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from qwenkit.api import AsyncLLM
from qwenkit.server.batch import run_batch
from qwenkit.server.batch_files import check_input, open_output
from qwenkit.server.settings import ServerSettings

pytest.importorskip("llguidance", reason="llguidance is not installed (the guided extra)")

DRAFT_7 = {"$schema": "http://json-schema.org/draft-07/schema#"}
DEMANDS: dict[str, Any] = {
    "not": {},
    "contains": {},
    "if": {},
    "propertyNames": {},
    "uniqueItems": True,
    "dependentRequired": {},
    "format": "unheard-of",
}
REMARKS: dict[str, Any] = {
    "title": "t",
    "default": "d",
    "contentEncoding": "base64",
    "foo": 1,
    "minLenght": 3,
    "items": {"not": {}},  # says nothing about a text
    "$defs": {"unused": {"not": {}}},
}


def test_keywords_that_are_refused_and_those_that_are_passed_over(
    tiny: Path, tmp_path: Path
) -> None:
    schemas = {key: {"type": "string", key: value} for key, value in (DEMANDS | REMARKS).items()}
    schemas["older"] = {"type": "string", "dependentRequired": {}, **DRAFT_7}
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for key, schema in schemas.items():
            form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
            body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
            line = {"custom_id": key, "url": "/v1/chat/completions"}
            print(json.dumps(line | {"body": body | {"response_format": form}}), file=file)
    asyncio.run(answer(tiny, source, output))
    refused = {}
    for line in map(json.loads, output.read_text(encoding="utf-8").splitlines()):
        if line["response"]["status_code"] != 200:
            refused[line["custom_id"]] = line["response"]["body"]["error"]["message"]
    assert set(refused) == set(DEMANDS)
    for key, message in refused.items():
        assert str(DEMANDS[key] if key == "format" else key) in message


async def answer(folder: Path, source: Path, output: Path) -> None:
    async with AsyncLLM(folder, threads=1, kv_cache_tokens=4096) as llm:
        file, done = open_output(output, check_input(source))
        with file:
            settings = ServerSettings(names=("tiny",), max_requests=1000)
            await run_batch(
                llm, settings, source, file, done, at_once=4, advance=lambda tokens: None
            )
