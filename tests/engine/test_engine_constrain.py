"""Constrained outputs: each keeps its constraint, changes nothing for others and fails alone."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import MODEL, Wrapped, engine, finish, request, run, text, tokens

from fakes import END, EOS, ByteTokenizer, tiny_model
from qwenkit.engine import constrain
from qwenkit.engine.constrain import Grammars, Matcher
from qwenkit.engine.engine import Engine, EngineSettings
from qwenkit.engine.grammar_text import MOST_LEVELS, choice_regex, schema_levels
from qwenkit.engine.request import Request
from qwenkit.errors import MissingDependencyError, RequestError
from qwenkit.tokenizer import BytePairTokenizer, from_tiktoken
from qwenkit.types.constraint import Constraint
from qwenkit.types.events import Event, TokenEvent

SCHEMA: dict[str, Any] = {
    "x-guidance": {"whitespace_flexible": False},  # a random model likes nothing more than spaces
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
SUM = 'start: NUMBER ("+" NUMBER)~1..3\nNUMBER: /[1-9][0-9]{0,2}/'
KINDS: dict[str, dict[str, Any]] = {
    "json_schema": {"json_schema": SCHEMA},
    "regex": {"regex": r"[A-Z][a-z]{2,8}, [0-9]{4}(!|\?)"},
    "choice": {"choice": ["yes", "no", "not at all", "ja, 好 \n\\"]},
    "grammar": {"grammar": SUM},
}


def keeps_schema(output: str) -> bool:
    value = json.loads(output)
    return (
        sorted(value) == sorted(SCHEMA["properties"])
        and isinstance(value["name"], str)
        and len(value["name"]) <= 4
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and value["kind"] in ("a", "b", None)
        and len(value["tags"]) <= 2
        and all(type(tag) is bool for tag in value["tags"])
    )


def keeps(kind: str, output: str) -> bool:
    if kind == "json_schema":
        return keeps_schema(output)
    if kind == "choice":
        return output in KINDS["choice"]["choice"]
    pattern = KINDS["regex"]["regex"] if kind == "regex" else r"[1-9]\d{0,2}(\+[1-9]\d{0,2}){1,3}"
    return re.fullmatch(pattern, output) is not None


def constrained(kind: str, seed: int, **sampling: Any) -> Request:
    asked = {"temperature": 1.5, "max_tokens": 220, **sampling}
    return request(f"{kind} {seed}", seed=seed, constraint=KINDS[kind], **asked)


@pytest.fixture(scope="module")
def qwen() -> BytePairTokenizer:
    """The first generation's vocabulary, of 151,936 rows with what pads it."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None, "the test extra installs dashscope"
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    return from_tiktoken(folder / "resources" / "qwen.tiktoken")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("greedy", [False, True])
def test_every_output_keeps_its_constraint_and_ends_with_the_models_stop(
    kind: str, greedy: bool
) -> None:
    served = engine()
    changes = {"temperature": 0} if greedy else {}
    requests = [constrained(kind, seed, **changes) for seed in range(1 if greedy else 20)]
    for events in run(served, *requests).values():
        assert keeps(kind, text(events))
        assert (finish(events).reason, finish(events).matched_stop) == ("stop", EOS)
        assert tokens(events)[-1] == EOS
        assert not {END, *range(258, 272)} & set(tokens(events))


def test_spaces_between_the_signs_of_json_are_a_line_and_its_indent_at_most() -> None:
    schema = {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}}
    asked = [
        request(str(seed), constraint={"json_schema": schema}, seed=seed, temperature=9)
        for seed in range(8)
    ]
    outputs = [text(events) for events in run(engine(prefix_cache=False), *asked).values()]
    assert any(output.count(" ") > 3 for output in outputs)
    for output in outputs:
        assert re.fullmatch(r"(?: |\n(?: {0,32}|\t{0,8})|[\[\],\d])+", output)
        assert not re.search(r"\n\s*\n", output)


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_real_vocabulary_too(kind: str, qwen: BytePairTokenizer) -> None:
    model = tiny_model(vocab_size=151_936)
    served = Engine(
        model,
        qwen,
        EngineSettings(kv_cache_tokens=2048),
        stop_token_ids=(151_643,),
        context_tokens=512,
    )
    for seed in range(3):
        served.add(constrained(kind, seed))
    texts: dict[str, str] = {}
    while served.has_work:
        for event in served.step():
            texts[event.request_id] = texts.get(event.request_id, "") + event.text
            if not isinstance(event, TokenEvent):
                assert (event.reason, event.matched_stop) == ("stop", 151_643)
    assert len(texts) == 3
    assert all(keeps(kind, output) for output in texts.values())


def test_different_constraints_beside_free_requests_give_what_each_gives_alone() -> None:
    requests = [constrained(kind, seed) for kind in KINDS for seed in range(4)]
    requests += [request(f"free {i}", f"prompt {i}", max_tokens=40, logprobs=2) for i in range(6)]
    alone = {one.id: run(engine(prefix_cache=False), one)[one.id] for one in requests}
    together = engine(max_batch_tokens=40, max_sequences=9, prefix_cache=False)
    assert run(together, *requests) == alone


def test_a_preempted_request_goes_on_where_its_constraint_was() -> None:
    requests = [constrained(kind, seed) for kind in KINDS for seed in range(4)]
    alone = {one.id: run(engine(prefix_cache=False), one)[one.id] for one in requests}
    tight = engine(kv_cache_tokens=240, max_batch_tokens=64, prefix_cache=False)
    assert {name: text(events) for name, events in run(tight, *requests).items()} == {
        name: text(events) for name, events in alone.items()
    }
    assert tight.status().preemptions > 0


def test_the_token_limit_ends_an_output_as_always() -> None:
    (events,) = run(
        engine(prefix_cache=False), constrained("json_schema", 1, max_tokens=5)
    ).values()
    assert (finish(events).reason, len(tokens(events))) == ("length", 5)


def test_a_stop_string_cuts_and_a_stop_token_waits_for_the_end() -> None:
    asked = request("a", constraint={"regex": "[a-f]{20}!"}, stop=("!",), seed=3, temperature=1)
    (events,) = run(engine(prefix_cache=False), asked).values()
    assert re.fullmatch("[a-f]{20}", text(events))
    assert finish(events).matched_stop == "!"
    asked = request(
        "a", constraint={"regex": "([a-c]{3}x?)+"}, stop_token_ids=[ord("b")], seed=3, temperature=1
    )
    (events,) = run(
        engine(prefix_cache=False), asked
    ).values()  # b may only come where the output may end
    assert re.fullmatch("([ac]{3})+", text(events))


def test_log_probabilities_are_those_of_the_model_alone() -> None:
    def flat(_: Any, logits: Any) -> Any:
        return logits * 0

    asked = request("a", constraint={"choice": ["yes"]}, logprobs=1)
    (events,) = run(engine(Wrapped(flat)), asked).values()
    probabilities = [event.logprob for event in events if isinstance(event, TokenEvent)]
    assert probabilities == pytest.approx([-5.605802066] * 4)  # of 272 rows


def test_fewer_tokens_than_asked_for_is_that_requests_error() -> None:
    asked = request("short", constraint={"choice": ["yes"]}, min_tokens=9)
    free = request("free", max_tokens=12)
    events = run(engine(prefix_cache=False), asked, free)
    assert finish(events["short"]).reason == "error"
    assert "min_tokens: nothing can follow 3 tokens" in str(finish(events["short"]).error)
    assert events["free"] == run(engine(prefix_cache=False), free)["free"]
    long = request("long", constraint={"regex": "[a-z]+"}, min_tokens=9, temperature=2, seed=1)
    assert len(text(run(engine(prefix_cache=False), long)["long"])) >= 9


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"constraint": {"regex": "("}}, "constraint.regex"),
        ({"constraint": {"grammar": "root ::= root"}}, "constraint.grammar"),
        ({"constraint": {"json_schema": {"type": "bogus"}}}, "constraint.json_schema"),
        ({"constraint": {"regex": "a"}, "ignore_eos": True}, "constraint.regex"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_it_is_accepted(
    sampling: dict[str, Any], field: str
) -> None:
    served = engine()
    with pytest.raises(RequestError) as caught:
        served.add(request("a", **sampling))
    assert caught.value.field == field
    assert not served.has_work


def test_a_grammar_that_outgrows_its_limits_ends_that_request_only() -> None:
    regex = "((a{1,500}){1,500}){1,500}"
    hard = request("hard", constraint={"regex": regex}, temperature=9, seed=1, min_tokens=200)
    free = request("free", max_tokens=30)
    events = run(
        engine(prefix_cache=False), hard, free, request("same", constraint={"regex": "a{3}"})
    )
    assert finish(events["hard"]).reason == "error"
    assert "constraint.regex: cannot be followed" in str(finish(events["hard"]).error)
    assert events["free"] == run(engine(prefix_cache=False), free)["free"]
    assert text(events["same"]) == "aaa"


def test_a_compilation_without_end_is_refused_and_the_next_one_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import threading

    held, compiled = threading.Event(), constrain._compile
    monkeypatch.setattr(constrain, "COMPILE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(constrain, "_compile", lambda *given: held.wait(60) and compiled(*given))
    grammars = Grammars(ByteTokenizer(), 258)
    with pytest.raises(RequestError, match=r"constraint.regex: takes more than"):
        grammars.matcher(Constraint(regex="a"), [EOS])
    held.set()
    monkeypatch.setattr(constrain, "COMPILE_TIMEOUT_S", 60)
    assert grammars.matcher(Constraint(regex="a"), [EOS]).mask().nonzero()[0].tolist() == [97]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match=r"qwenkit\[guided\]"):
        engine().add(request("a", constraint={"regex": "a"}))
    engine().add(request("a"))


def matcher(**constraint: Any) -> Matcher:
    return Grammars(ByteTokenizer(), 258).matcher(Constraint.from_mapping(constraint), [EOS])


def test_a_matcher_follows_token_by_token() -> None:
    follow = matcher(regex="ab?c*")
    assert (follow.may_end, follow.is_complete) == (False, False)
    for token_id, allowed in ((97, [97]), (98, [98, 99, EOS])):
        assert follow.mask().nonzero()[0].tolist() == allowed
        follow.consume(token_id)
    assert follow.mask().nonzero()[0].tolist() == [99, EOS]
    assert (follow.may_end, follow.is_complete) == (True, False)
    with pytest.raises(RequestError, match="token 257 does not keep to it"):
        follow.consume(END)
    follow.consume(EOS)
    assert follow.is_complete
    with pytest.raises(RequestError, match="token 99"):
        follow.consume(99)


def test_a_complete_grammar_allows_stop_tokens_only() -> None:
    follow = matcher(choice=["ab"])
    with pytest.raises(RequestError, match="token 256"):
        follow.consume(EOS)
    follow.consume(97)
    follow.consume(98)
    assert follow.is_complete
    assert follow.mask().nonzero()[0].tolist() == [EOS]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6), st.integers(0, 2**32))
def test_any_choice_is_made_of_its_texts(texts: list[str], seed: int) -> None:
    asked = request("a", constraint={"choice": texts}, seed=seed, temperature=5, max_tokens=200)
    (events,) = run(engine(prefix_cache=False), asked).values()
    assert text(events) in texts
    assert all(re.fullmatch(python_form(choice_regex((one,))), one) for one in texts)


def python_form(regex: str) -> str:
    return re.sub(r"\\x\{(\w+)\}", lambda found: rf"\U{int(found[1], 16):08X}", regex)


ATOMS = st.sampled_from(["a", "b", "[a-f]", "[0-9]", "(x|yz)", "é", r"\.", "[^a-z\n]"])
REPEATS = st.sampled_from(["", "?", "{2}", "{1,3}", "{0,2}"])
REGEXES = st.recursive(
    st.tuples(ATOMS, REPEATS).map("".join),
    lambda parts: st.one_of(
        st.tuples(parts, parts).map("".join),
        st.tuples(parts, parts).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(parts, REPEATS).map(lambda pair: f"({pair[0]}){pair[1]}"),
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(REGEXES, st.integers(0, 2**32))
def test_any_small_regex_matches_what_comes(regex: str, seed: int) -> None:
    asked = request("a", constraint={"regex": regex}, seed=seed, temperature=3, max_tokens=230)
    (events,) = run(engine(prefix_cache=False), asked).values()
    assert finish(events).reason == "stop"
    assert re.fullmatch(regex, text(events)), (regex, text(events))


def test_the_levels_of_a_schema_go_through_its_references() -> None:
    part = {"type": "array", "items": {"$ref": "#/$defs/b"}}
    assert schema_levels({"type": "string"}) == 1
    assert schema_levels(part) == 4  # a reference that leads nowhere counts as the whole
    assert schema_levels({"$defs": {"a": part, "b": {}}, "$ref": "#/$defs/b"}) == 4 + 1
    long = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {}]} for i in range(900)}
    assert schema_levels({"$defs": long, "$ref": "#/$defs/d0"}) > MOST_LEVELS


def test_a_thousand_schemas_leave_nothing_behind() -> None:
    """Row 15: what is compiled belongs to its request, so there is no cache that could grow."""
    grammars = Grammars(ByteTokenizer(), 258)
    before = len(vars(grammars))
    for i in range(1_000):
        one = Constraint.from_mapping({"json_schema": {"const": f"number {i}"}})
        grammars.matcher(one, [EOS]).mask()
    assert len(vars(grammars)) == before
    assert not [v for v in vars(grammars).values() if isinstance(v, dict | list) and len(v) > 2]


def test_hostile_constraints_are_refused_or_served_in_little_memory() -> None:
    """Row 15: no crash, no hang, no other error and at most 50 MB more, of the real vocabulary."""
    program = Path(__file__).with_name("hostile_constraints.py")
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, check=False, timeout=240
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(lines) >= 60
    assert [line for line in lines if line["peak_mb"] > 50] == []
    refused = {line["name"] for line in lines if line["outcome"] == "refused"}
    assert {
        "regex: unclosed",
        "json_schema: nested 10,000",
        "json_schema: nested 900",
        "grammar: another language",
        "grammar: itself",
        "grammar: a hundred thousand rules",
        "grammar: a control token",
        "choice: none",
    } <= refused


def test_streamed_text_is_the_whole_text() -> None:
    (events,) = run(engine(prefix_cache=False), constrained("choice", 11)).values()
    deltas = [event.text for event in events if isinstance(event, TokenEvent)]
    whole = ByteTokenizer().decode(tokens(events))
    assert "".join(deltas) + last(events) == whole


def last(events: list[Event]) -> str:
    return finish(events).text


def test_the_same_seed_gives_the_same_output() -> None:
    runs = [run(engine(prefix_cache=False), constrained("json_schema", 5)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0] != run(engine(prefix_cache=False), constrained("json_schema", 6))
    assert MODEL.config.vocab_size == 272  # of which 14 pad: see the first test
