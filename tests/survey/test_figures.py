"""The published figures: whole, with sources, checked against each other and by counting."""

from __future__ import annotations

import copy
import json
from importlib import resources
from typing import Any

import pytest
import torch

from qwenkit.bench.shapes import SHAPES
from qwenkit.errors import ConfigError, UsageError
from qwenkit.models.spec import find
from qwenkit.survey.figures import (
    TOPICS,
    Figure,
    check_topic,
    clashes,
    figures_of,
    model_name,
    published,
    read_published,
)

FILE = resources.files("qwenkit.survey").joinpath("published_figures.json")


def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def _values(name: str, quantity: str, **setting: object) -> list[float | None]:
    return [
        f.value
        for f in figures_of(name)
        if f.quantity == quantity and setting.items() <= f.setting.items()
    ]


def test_every_figure_has_a_value_a_unit_and_a_dated_source() -> None:
    figures = published().figures
    assert len(figures) > 1000
    for figure in figures:
        assert figure.unit
        assert figure.topic in TOPICS
        assert 2023 <= figure.source.date.year <= 2024
        assert figure.source.address.startswith("https://")
        assert figure.value is None or figure.value >= 0
        assert figure.value is None or figure.unit != "%" or figure.value <= 100
    assert {f.topic for f in figures} == set(TOPICS)


def test_what_the_documents_say_of_quantized_models_is_there() -> None:
    chat = {"weights": "GPTQ-Int4"}
    assert _values("Qwen-14B-Chat", "HumanEval", **chat) == [45.7, 45.7]
    assert _values("Qwen-7B-Chat", "GSM8K", **chat) == [38.1, 49.7]
    assert _values("Qwen-7B-Chat", "MMLU", weights="GPTQ-Int8") == [55.4]
    assert _values("Qwen-7B", "memory for loading", weights="NF4") == [7.4, 7.79]
    assert _values("Qwen2-7B-Instruct", "IFEval strict prompt", weights="AWQ") == [51.4]
    assert _values("Qwen2-0.5B-Instruct", "MMLU", **chat) == [33.0]
    assert _values("Qwen-7B-Chat", "peak memory", cache="Int8", batch=64) == [48.2]
    assert _values("Qwen-7B-Chat", "peak memory", cache="BF16", batch=64) == [None]


def test_what_the_documents_say_of_speed_and_memory_is_there() -> None:
    assert _values("Qwen-7B-Chat", "generating", generated=8192) == [29.32, 33.92]
    assert _values("Qwen-14B-Chat", "peak memory", context=2048) == [30.15, 13.00]
    assert _values("Qwen-72B-Chat", "generating", weights="BF16") == [8.48, 17.60]
    assert _values("Qwen2-0.5B-Instruct", "generating", weights="BF16", context=1) == [
        49.94,
        270.49,
    ]
    moe = _values("Qwen2-57B-A14B-Instruct", "generating", weights="BF16", context=1)
    assert moe == [4.76, 31.44]
    assert _values("Qwen2-57B-A14B-Instruct", "throughput", prompts=100) == [5291.15]
    assert _values("Qwen-7B", "peak memory", method="Q-LoRA", length=256) == [11.5]
    assert _values("Qwen-14B", "perplexity", length=16384)[-1] == 3.42


@pytest.mark.parametrize(
    "given",
    [
        "Qwen2-7B-Instruct",
        "Qwen/Qwen2-7B-Instruct-GPTQ-Int4",
        "./models/qwen2-7b-instruct-q4_k_m.gguf",
        "Qwen/Qwen2-7B-Instruct-GGUF:qwen2-7b-instruct-q5_0.gguf",
        "C:\\models\\Qwen2-7B-Instruct-AWQ\\",
        "Qwen2-7B-Instruct-iq4_xs-imatrix.gguf",
    ],
)
def test_a_model_is_found_by_the_names_that_users_have(given: str) -> None:
    assert model_name(given).lower() == "qwen2-7b-instruct"
    assert figures_of(given) == figures_of("Qwen2-7B-Instruct")


def test_one_name_of_two_checkpoints_finds_both() -> None:
    assert {f.model for f in figures_of("Qwen/Qwen-7B")} == {"Qwen-7B", "Qwen-7B (August 2023)"}
    assert figures_of("my-own-model") == []
    assert {f.topic for f in figures_of("Qwen-7B", topics=["memory"])} == {"memory"}
    with pytest.raises(UsageError, match=r"topic: got 'spede'\. Did you mean 'speed'"):
        check_topic("spede")


def _key(figure: Figure) -> tuple[object, ...]:
    setting = tuple(sorted(figure.setting.items()))
    return figure.table, figure.model, figure.quantity, setting


def test_no_contradiction_goes_unlisted() -> None:
    listed = {_key(side) for entry in published().contradictions for side in entry.sides}
    found = [figure for clash in clashes(published().figures) for figure in clash]
    assert len(found) > 20
    assert [f for f in found if _key(f) not in listed] == []


def test_what_is_listed_is_a_contradiction() -> None:
    entries = published().contradictions
    assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
    assert len(entries) >= 14
    for entry in entries:
        assert entry.settled
        values = {(side.model, side.quantity, side.value) for side in entry.sides}
        assert len(values) > 1 or len(entry.sides) < 2, entry.number


def test_a_planted_contradiction_is_found() -> None:
    content = _content()
    tables = {table["name"]: table for table in content["tables"]}
    rows = tables["chat-int8"]["rows"]
    wrong = next(row for row in rows if row[:2] == ["Qwen-14B-Chat", {"weights": "BF16"}])
    wrong[2] = 99.9  # MMLU, which the older table has as well
    before, after = (clashes(p.figures) for p in (published(), read_published(content)))
    assert len(after) == len(before) + 1
    assert any(f.value == 99.9 for clash in after for f in clash)


@pytest.mark.parametrize("name", ["qwen2-0.5b", "qwen2-1.5b", "qwen2-7b", "qwen1.5-7b"])
def test_sizes_are_those_that_the_shapes_have(name: str) -> None:
    config = SHAPES[name]
    architecture = find(config["model_type"])
    with torch.device("meta"):
        model = architecture.build(architecture.config(config))
    total = sum(parameter.numel() for parameter in model.parameters())
    rows = config["vocab_size"] * config["hidden_size"]
    inside = total - rows * (1 if config["tie_word_embeddings"] else 2)
    counted = {"parameters": total, "parameters without embeddings": inside}
    wrong = [
        (figure.table, figure.value)
        for figure in figures_of(name, topics=["size"])
        if figure.quantity in counted
        and abs((figure.value or 0) - counted[figure.quantity] / 1e9) > 0.06
    ]
    expected = [("sizes-qwen2", 7.07), ("sizes-qwen2", 5.98)] if name == "qwen2-7b" else []
    assert wrong == expected  # the first contradiction, settled by counting


def _changed(path: list[Any], value: object) -> dict[str, Any]:
    content = copy.deepcopy(_content())
    place: Any = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["extra"], 1, "the file: extra: unknown"),
        (["sources", "card-qwen", "date"], "August 2023", "date: got 'August 2023'"),
        (["sources", "card-qwen", "by"], "me", "source card-qwen: by"),
        (["tables", 0, "source"], "card-qwem", "table 'chat-int4': source: got 'card-qwem'. Did"),
        (["tables", 0, "topic"], "looks", "topic: got 'looks'"),
        (["tables", 0, "notes"], "", "table 'chat-int4': notes"),
        (["tables", 0, "columns", 0, "shot"], 5, "columns: shot"),
        (["tables", 0, "rows", 0], ["M", {}, 1.0], "has 1 values; there are 4 columns"),
        (["tables", 0, "rows", 0, 2], "53.9", r"Qwen-7B-Chat, .*: got '53.9'; expected a number"),
        (["tables", 0, "rows", 0, 2], True, "got True; expected a number"),
        (["tables", 0, "rows", 1, 1], {"weights": "BF16"}, "is there twice"),
        (["tables", 1, "name"], "chat-int4", "a name is there twice"),
        (["contradictions", 0, "sides", 0, "model"], "Qwen3", "0 figures are meant"),
        (["contradictions", 3, "sides", 0, "setting"], {}, "2 figures are meant"),
    ],
)
def test_a_damaged_file_is_refused(path: list[Any], value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_published(_changed(path, value))
