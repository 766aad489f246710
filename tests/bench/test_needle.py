"""The needle test: exact lengths, places, scores of models that copy, resumption, refusals."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.api import LLM
from qwenkit.bench.needle import (
    Cell,
    NeedleSettings,
    NeedleTable,
    measure_needle,
    read_table,
    write_table,
)
from qwenkit.bench.needle_reader import ModelReader
from qwenkit.bench.needle_text import (
    Hunt,
    Needle,
    built_in,
    exact_prompt,
    is_in,
    languages,
    placed,
    score,
    spread,
)
from qwenkit.errors import UsageError
from qwenkit.layers.attention import AttentionContext
from qwenkit.models.spec import CausalModel, ModelConfig, find
from tiny import CONFIG, IM_END, write_tiny_checkpoint

DEPTHS = (0, 25, 50, 75, 100)
ROOM = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"max_position_embeddings": 2048}
    return write_tiny_checkpoint(tmp_path_factory.mktemp("needle") / "tiny", config=config)


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, compute="reference") as llm:
        yield llm


def fresh(hunt: Hunt, **changes: Any) -> NeedleTable:
    table = NeedleTable(
        model="tiny",
        compute="reference",
        haystack="en",
        question=hunt.question,
        needles=tuple(needle.text for needle in hunt.needles),
        answers=tuple(needle.answer for needle in hunt.needles),
        answer_tokens=ROOM,
    )
    return dataclasses.replace(table, **changes)


class Copier(CausalModel):
    """Answers with every code among the last `sight` bytes that it was shown."""

    def __init__(self, config: ModelConfig, sight: int) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        self._sight = sight
        self._shown: list[int] = []
        self.prompts: list[list[int]] = []

    def forward(self, ids: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        self._shown += ids.tolist()
        rows = context.select(torch.zeros(len(ids), self.config.vocab_size))
        if len(rows):  # the last chunk of the prompt, or a token of the answer
            rows[0, self._next()] = 1
        return rows

    def _next(self) -> int:
        text = bytes(i if i < 256 else 0 for i in self._shown).decode("utf-8", "replace")
        prompt, _, reply = text.rpartition("assistant\n")
        answer = ", ".join(re.findall(r"(?:is |是)(\d{5})[.。]", prompt[-self._sight :])) or "none"
        if len(reply) < len(answer):
            return ord(answer[len(reply)])
        self.prompts.append(self._shown[: -len(answer)])
        self._shown = []
        return IM_END


def found(
    llm: LLM, hunt: Hunt, sight: int, *, length: int = 700, depths: Sequence[int] = DEPTHS
) -> list[float]:
    """The scores of a copying model at every depth."""
    llm.model = Copier(llm.config, sight)
    table = measure_needle(
        lambda rope, longest: ModelReader(llm, rope, longest, reference=True),
        hunt,
        NeedleSettings(ropes=("per-request",), lengths=(length,), depths=tuple(depths)),
        fresh(hunt),
        save=lambda done: None,
    )
    assert [len(ids) for ids in llm.model.prompts] == [length - ROOM] * len(depths)
    assert all(
        cell.prompt_tokens == length - ROOM for cell in table.cells["per-request"][length].values()
    )
    return list(table.grid("per-request")[length].values())


@pytest.mark.parametrize("language", languages())
def test_a_model_that_copies_finds_every_needle(llm: LLM, language: str) -> None:
    assert found(llm, built_in(language), 10_000) == [1.0] * 5


def test_a_model_that_sees_the_end_only_finds_what_lies_there(llm: LLM) -> None:
    hunt = built_in("en")
    assert found(llm, hunt, 400) == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert found(llm, hunt, 300) == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert found(llm, hunt, 100) == [0.0] * 5  # the question alone is as long


def test_of_several_needles_the_share_is_scored(llm: LLM) -> None:
    hunt = built_in("en", needles=2)
    assert found(llm, hunt, 10_000, length=900, depths=(0, 50)) == [1.0, 1.0]
    assert found(llm, hunt, 560, length=900, depths=(0, 50)) == [0.5, 1.0]


def test_ones_own_needle_question_and_haystack(llm: LLM) -> None:
    own = Needle("猫的名字是{code}。", "{code}")
    hunt = Hunt("读。", "猫叫什么？", (own,), "", text="天很高。地很大。\n水很长。")
    assert found(llm, hunt, 10_000, length=500) == [1.0] * 5


@given(
    st.sampled_from(
        ["", "日本語の文。 Ünï çödé! no end of a sentence here 🙂🙂", "Времяпреступленияидут"]
    ),
    st.sampled_from([*languages()]),
    st.integers(0, 100),
    st.integers(400, 900),
)
def test_every_prompt_has_its_length_exactly(
    text: str, language: str, depth: int, tokens: int
) -> None:
    hunt = built_in(language, text=text)
    ids, (needle,) = exact_prompt(
        hunt, depth=depth, tokens=tokens, render=lambda text: text.encode(), key="k"
    )
    assert len(ids) == tokens
    prompt = bytes(ids).decode()
    assert prompt.startswith(f"{hunt.instruction}\n\n")
    assert prompt.endswith(f"\n\n{hunt.question}")
    assert prompt.count(needle.text) == 1
    assert needle.answer in needle.text


@given(st.sampled_from([*languages()]), st.integers(0, 100), st.integers(1, 4))
def test_needles_stand_between_sentences_near_their_depth(
    language: str, depth: int, count: int
) -> None:
    hunt = built_in(language)
    haystack = hunt.haystack(1500)
    needles = [Needle(f"[{n}]", "") for n in range(count)]
    text = placed(haystack, needles, depth, hunt.gap)
    rest = text
    for number, share in enumerate(spread(depth, count)):
        before, mark, rest = rest.partition(f"[{number}]{hunt.gap}")
        assert mark
        where = len(re.sub(r"\[\d\]\s?", "", text[: text.index(mark)]))
        assert abs(where - share * 1500) < 80  # no sentence is as long
        assert not before or before.rstrip()[-1] in ".。"
    assert re.sub(rf"\[\d\]{hunt.gap}", "", text) == haystack


def test_the_last_place_is_behind_the_last_whole_sentence() -> None:
    needle = [Needle("N.", "")]
    assert placed("One. Two. Thr", needle, 100, " ") == "One. Two. N. Thr"
    assert placed("One. Two.", needle, 100, " ") == "One. Two. N. "
    assert placed("One. Two.", needle, 0, " ") == "N. One. Two."
    assert placed('"No!" he said. 3.5 is it', needle, 70, " ") == '"No!" he said. N. 3.5 is it'
    assert placed("一。“二！”三", needle, 100, "") == "一。“二！”N.三"
    assert placed("no end", needle, 100, " ") == "N. no end"
    unmarked = "เธอ เดิน ไป " * 300  # no sentence ends in Thai
    place = placed(unmarked, needle, 50, "").index("N.")
    assert abs(place - len(unmarked) / 2) < 10
    assert unmarked[place - 1] == " "
    assert spread(20, 4) == [0.2, 0.4, 0.6, 0.8]


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        ("48213", "It is 48213.", True),
        ("48213", "**48,213**", True),
        ("48213", "12345,48213", True),
        ("48213", "148213", False),
        ("48213", "482134", False),
        ("48213", "48,213,000", False),
        ("48213", "4 8 2 1 3", False),
        ("Mount  Everest", "it is mount\neverest!", True),
        ("Everest", "K2", False),
    ],
)
def test_an_answer_is_recognised(answer: str, reply: str, right: bool) -> None:
    assert is_in(answer, reply) is right
    assert score(reply, [Needle("", answer), Needle("", "nowhere")]) == right / 2


def test_every_cell_has_its_own_numbers_and_always_the_same() -> None:
    hunt = built_in("en", needles=8)

    def numbers(key: str) -> list[str]:
        needles = exact_prompt(hunt, depth=0, tokens=1500, render=str.encode, key=key)[1]
        return [needle.answer for needle in needles]

    assert len(set(numbers("a")) | set(numbers("b"))) == 16
    assert numbers("a") == numbers("a")


def test_an_answer_that_is_given_away_is_refused() -> None:
    given_away = Hunt("i", "q?", (Needle("The cat is red.", "red"),), " ", ("A Red house.",))
    with pytest.raises(UsageError, match="'red' stands in the haystack or in the question"):
        exact_prompt(given_away, depth=0, tokens=300, render=str.encode, key="k")


def test_an_interrupted_measurement_goes_on(tmp_path: Path) -> None:
    hunt = built_in("en")
    settings = NeedleSettings(ropes=("none", "yarn"), lengths=(400, 500), depths=(0, 100))
    asked: list[tuple[str, int]] = []

    class Interrupted(Exception):
        pass

    class Fake:
        def __init__(self, rope: str, longest: int) -> None:
            assert longest == 500
            self.rope = rope

        def render(self, message: str) -> Sequence[int]:
            return message.encode()

        def answer(
            self, ids: Sequence[int], *, max_tokens: int, progress: Callable[[float], None]
        ) -> tuple[str, str]:
            asked.append((self.rope, len(ids)))
            progress(0.5)
            return bytes(ids).decode() if self.rope == "none" else "no", self.rope

    def interrupt(done: NeedleTable) -> None:
        write_table(tmp_path, done)
        if len(asked) == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        measure_needle(Fake, hunt, settings, fresh(hunt), save=interrupt)
    shares: list[float] = []
    kept = read_table(tmp_path / "needle.json", fresh(hunt))
    done = measure_needle(
        Fake,
        hunt,
        settings,
        kept,
        save=lambda table: write_table(tmp_path, table),
        progress=lambda what, share: shares.append(share),
    )
    lengths = (400 - ROOM, 500 - ROOM)
    assert asked == [(r, n) for r in ("none", "yarn") for n in lengths for _ in (0, 100)]
    assert shares == sorted(shares)
    assert shares[-1] < 1
    assert done.grid("none") == {400: {0: 1.0, 100: 1.0}, 500: {0: 1.0, 100: 1.0}}
    assert done.grid("yarn") == {400: {0: 0.0, 100: 0.0}, 500: {0: 0.0, 100: 0.0}}
    assert read_table(tmp_path / "needle.json", fresh(hunt)).cells == done.cells


def test_the_files_say_the_same(tmp_path: Path) -> None:
    hunt = built_in("en")
    cell = Cell(score=0.5, answers=("1",), reply="一", prompt_tokens=9, extension="none 1")
    table = fresh(hunt, cells={"a<b": {1024: {50: cell}, 64: {0: cell, 50: cell}}})
    write_table(tmp_path, table)
    text = (tmp_path / "needle.md").read_text()
    assert "| a<b | 64 | 1,024 |\n| --- | ---: | ---: |\n| 0 % | 0.50 | – |" in text
    assert "| mean | 0.50 | 0.50 |" in text
    picture = ElementTree.fromstring((tmp_path / "needle.svg").read_text())
    tiles = picture.findall("{http://www.w3.org/2000/svg}rect")
    assert [tile.get("fill") for tile in tiles] == ["white", *["rgb(240,228,66)"] * 3]
    with pytest.raises(UsageError, match="measured with needles"):
        read_table(
            tmp_path / "needle.json", fresh(built_in("en", needles=2), question=hunt.question)
        )


def test_ropes_are_compared_on_one_model_and_leave_it_as_it_was(llm: LLM) -> None:
    hunt, before = built_in("en"), llm.model.config
    ropes = ("none", "per-request", "yarn", "dual-chunk")
    table = measure_needle(
        lambda rope, longest: ModelReader(llm, rope, longest, reference=True),
        hunt,
        NeedleSettings(ropes=ropes, lengths=(400, 2400), depths=(50,)),
        fresh(hunt),
        save=lambda done: None,
    )
    cells = {rope: {n: row[50] for n, row in grid.items()} for rope, grid in table.cells.items()}
    assert cells["per-request"][400] == cells["none"][400]
    assert [cells[rope][2400].extension for rope in ropes] == [
        "none 1",
        "yarn 2",
        "yarn 4",
        "dual-chunk 1",
    ]
    assert len({cells[rope][2400].reply for rope in ropes}) == 4
    assert llm.model.config is before
    assert all(layer.self_attn.position == before.position for layer in llm.model.model.layers)


def test_a_model_without_rotary_positions_has_nothing_to_extend(tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "baichuan", "max_position_embeddings": None}
    config |= {"model_max_length": 512, "z_loss_weight": 0}
    architecture = find("baichuan")
    made = architecture.build(architecture.config(config)).state_dict()
    tensors = {name: torch.ones_like(tensor) for name, tensor in made.items()}
    with LLM(write_tiny_checkpoint(tmp_path / "m", config=config, tensors=tensors)) as llm:
        assert ModelReader(llm, "per-request", 512).render("Hi")
        with pytest.raises(UsageError, match="m has no rotary positions to be extended"):
            ModelReader(llm, "yarn", 512)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ropes": ("yarm",)}, r"rope: got 'yarm'\. Did you mean 'yarn'"),
        ({"lengths": ()}, "length"),
        ({"depths": (101,)}, "depth"),
        ({"depths": ()}, "depth"),
    ],
)
def test_wrong_needle_settings_are_named(wrong: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"ropes": ("none",), "lengths": (400,), "depths": (0,)}
    with pytest.raises(UsageError, match=message):
        NeedleSettings(**right | wrong)
