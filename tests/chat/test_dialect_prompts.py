"""Prompts with tools, byte for byte as the programs that the models were trained for write them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_fakes import ControlBytes, chatml_record, published_record, template_record

from qwenkit.chat.dialects.spec import Conversation, dialects, find
from qwenkit.chat.render import Rendered, render
from qwenkit.chat.replies import ReplyFormat
from qwenkit.errors import RequestError
from qwenkit.types.messages import Message, Tool, ToolCall, parse_messages, parse_tools
from qwenkit.types.tools import ToolOptions

GOLDEN = Path(__file__).parents[1] / "golden"
QWEN_AGENT: dict[str, Any] = json.loads((GOLDEN / "tools" / "qwen_fn.json").read_text("utf-8"))
FIRST: dict[str, Any] = json.loads((GOLDEN / "tools" / "react.json").read_text("utf-8"))
JUDGED: dict[str, Any] = json.loads((GOLDEN / "react" / "cases.json").read_text("utf-8"))
TOKENIZER = ControlBytes()
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}
{{- '<|im_end|>' + '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def texts(golden: dict[str, Any], case: dict[str, Any]) -> list[tuple[str, str]]:
    return [(role, golden["texts"][index]) for role, index in case["messages"]]


def prompt(messages: list[tuple[str, str]], *, is_open: bool) -> str:
    turns = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages]
    text = "".join(turns)
    return text.removesuffix("<|im_end|>\n") if is_open else f"{text}<|im_start|>assistant\n"


def test_every_dialect_is_found() -> None:
    assert {"hermes", "qwen_fn", "react", "template"} <= set(dialects())
    assert all(dialect.name == name for name, dialect in dialects().items())
    with pytest.raises(RequestError, match=r"tool_options.dialect: got 'hermse'.*hermes"):
        find("hermse")


@pytest.mark.parametrize("case", QWEN_AGENT["cases"], ids=lambda c: c["conversation"])
def test_qwen_fn_is_qwen_agents(case: dict[str, Any]) -> None:
    choice = case["choice"]
    rendered = render(
        parse_messages(QWEN_AGENT["conversations"][case["conversation"]]),
        tokenizer=TOKENIZER,
        record=replace(template_record(CHATML), dialect="qwen_fn"),
        tools=parse_tools(QWEN_AGENT["tools"]),
        tool_options=ToolOptions(
            choice=choice, language=case["language"], parallel=case["parallel"]
        ),
    )
    expected = texts(QWEN_AGENT, case)
    is_open = expected[-1][0] == "assistant"
    assert rendered.text == prompt(expected, is_open=is_open)
    start = "✿FUNCTION✿: get_current_weather" if choice != "auto" else "✿RETURN✿"
    assert rendered.reply.start == (start if is_open else "")
    assert rendered.reply.stops == ("✿RESULT✿", "✿RETURN✿")


@pytest.mark.parametrize("case", FIRST["cases"], ids=lambda c: c["conversation"])
def test_react_is_that_of_the_original_server(case: dict[str, Any]) -> None:
    given = parse_messages(FIRST["conversations"][case["conversation"]])
    tools = parse_tools([FIRST["tools"][index] for index in case["tools"] or ()])
    if "error" in case:
        if case["error"] == "Invalid request":
            case["error"] += ": Expecting exactly one user"
        with pytest.raises(RequestError, match=case["error"].split(": ")[1]):
            find("react").write(Conversation(messages=given, tools=tools))
        return
    expected = texts(FIRST, case)
    written = find("react").write(Conversation(messages=given, tools=tools))
    system = [("system", "You are a helpful assistant.")] if given[0].role != "system" else []
    assert [*system, *((m.role, m.content) for m in written.messages)] == expected
    if not tools and not any(m.tool_calls for m in given):
        return  # rendered without a dialect: what nobody asked to be stripped stays
    rendered = render(given, tokenizer=TOKENIZER, record=chatml_record(), tools=tools)
    assert rendered.text == prompt(expected, is_open=case["open"])
    assert rendered.reply.start == ("Thought:" if case["open"] else "")
    assert rendered.reply.stops == (("Observation:",) if tools else ())


def reader(start: str = "") -> ReplyFormat:
    tools = (
        Tool("google_search", "", {}),
        Tool("weather_api", "", {"properties": {"city": {}, "unit": {}}}),
    )
    return ReplyFormat(dialect=find("react"), tools=tools, start=start)


@pytest.mark.parametrize("case", FIRST["replies"], ids=lambda c: c["text"][:20])
def test_react_replies_are_read_as_the_original_server_does(case: dict[str, Any]) -> None:
    text = case["text"].partition("Observation:")[0]  # where the engine stops
    reply = reader("Thought:" if text.startswith(" ") else "").parsed(text)
    assert reply.content == case["content"]
    calls = [{"name": c.name, "arguments": c.arguments} for c in reply.tool_calls]
    assert calls == ([case["function_call"]] if case["function_call"] else [])


@pytest.mark.parametrize("case", JUDGED["cases"], ids=lambda c: c["gen"][:20])
def test_react_calls_agree_with_the_original_scorer(case: dict[str, Any]) -> None:
    """As far as the scorer looks for what is there: without an action it cuts texts at random."""
    said, observed, answered = case["gen"].partition("\nObservation:")
    reply, parsed = reader().parsed(said), case["parsed"]
    if "\nAction:" in said and parsed["action_input"]:
        (call,) = reply.tool_calls
        assert call.name == parsed["action"].lower()
        arguments = json.dumps(json.loads(call.arguments), ensure_ascii=False, sort_keys=True)
        assert arguments == parsed["action_input"]
        assert f"Thought: {reply.content}".strip() == (parsed["thought"] or "Thought:").strip()
    elif "\nAction:" in said:  # arguments that are none: the scorer counts the action alone
        assert (reply.content, reply.tool_calls) == (said, ())
    elif "Final Answer:" in said:
        assert reply.content == parsed["final_answer"]
    if observed and "Thought:" in answered and answered.count("Action:") == 0:
        last = reader("Thought:").parsed(answered.partition("Thought:")[2])
        assert last.content == parsed["final_answer"]
        assert last.reasoning == parsed["thought_last"]


@pytest.mark.parametrize(
    ("args_format", "ending"),
    [
        ("json", " Format the arguments as a JSON object."),
        (
            "code",
            " Enclose the code within triple backticks (`) at the beginning and end of the code.",
        ),
        ("Be brief.", " Be brief."),
        (None, ""),
    ],
)
def test_a_tool_may_say_how_its_arguments_look(args_format: str | None, ending: str) -> None:
    tool = Tool("f", "Does f.", {}, title="Eff", args_format=args_format)
    written = find("react").write(Conversation(messages=(Message("user", "q"),), tools=(tool,)))
    line = (
        "f: Call this tool to interact with the Eff API. What is the Eff API useful for? Does f. "
        f"Parameters: {{}}{ending}\n"
    )
    assert line in written.messages[0].content


HERMES = [
    Message("system", "Be brief."),
    Message("user", "Weather?"),
    Message(
        "assistant",
        "Let me look.",
        tool_calls=(
            ToolCall("get_current_weather", '{"city": "北京"}'),
            ToolCall("get_current_weather", '{"city": "Paris"}'),
        ),
    ),
    Message("tool", "sunny"),
    Message("tool", "<b>rain</b>"),
    Message("assistant", "Sunny and rain."),
    Message("user", "Thanks"),
]


@pytest.mark.parametrize("length", [2, 5, 7])
def test_our_own_hermes_is_qwen25s_template(length: int) -> None:
    tools = parse_tools([QWEN_AGENT["tools"][0]])
    own, published = (
        render(HERMES[:length], tokenizer=TOKENIZER, record=record, tools=tools)
        for record in (
            replace(template_record(CHATML), dialect="hermes"),
            replace(published_record("Qwen-Qwen2.5-7B-Instruct.jinja"), dialect="hermes"),
        )
    )
    assert own.text == published.text
    assert own.reply == published.reply


def test_tools_are_hidden_where_none_may_be_called() -> None:
    def rendered(choice: str) -> Rendered:
        return render(
            HERMES[:2],
            tokenizer=TOKENIZER,
            record=chatml_record(),
            tools=[Tool("f", "", {})],
            tool_options=ToolOptions(choice=choice),
        )

    assert "Action" in rendered("auto").text
    assert (
        rendered("none").text
        == render(HERMES[:2], tokenizer=TOKENIZER, record=chatml_record()).text
    )
    assert (rendered("none").reply.tools, rendered("none").reply.stops) == ((), ())
    for choice, message in (("g", "got 'g'. Allowed: f"), ("", "got ''; allowed: auto")):
        with pytest.raises(RequestError, match=rf"tool_options.choice: {message}"):
            rendered(choice)
    with pytest.raises(RequestError, match="got 'required', but there are no tools"):
        render(
            HERMES[:2],
            tokenizer=TOKENIZER,
            record=chatml_record(),
            tool_options=ToolOptions(choice="required"),
        )


def test_a_result_needs_an_answer_before_it() -> None:
    wrong = [Message("user", "q"), Message("tool", "r")]
    for name, words in (("react", "before role function"), ("qwen_fn", "must follow a call")):
        with pytest.raises(RequestError, match=rf"messages\[1\].*{words}"):
            find(name).write(Conversation(messages=tuple(wrong)))


def test_results_come_in_the_order_of_their_calls() -> None:
    calls = (ToolCall("f", "{}", "1"), ToolCall("g", "{}", "2"))
    asked = [Message("user", "q"), Message("assistant", "", tool_calls=calls)]
    one, two = (Message("tool", text, tool_call_id=text) for text in ("1", "2"))

    def text(*results: Message) -> str:
        record = replace(template_record(CHATML), dialect="qwen_fn")
        return render([*asked, *results], tokenizer=TOKENIZER, record=record).text

    assert text(two, one) == text(one, two)
    assert text(one, two).endswith("✿RESULT✿: 1\n✿RESULT✿: 2\n✿RETURN✿")
    unnamed = replace(one, tool_call_id=None)
    assert text(two, unnamed).endswith("✿RESULT✿: 2\n✿RESULT✿: 1\n✿RETURN✿")
    assert text(two).endswith("✿RESULT✿: 2\n✿RETURN✿")


@pytest.mark.parametrize("name", sorted(dialects()))
def test_a_definition_that_is_too_deep_is_refused_by_field(name: str) -> None:
    deep: dict[str, Any] = {}
    for _ in range(20_000):
        deep = {"a": deep}
    for tool in (Tool("f", "", deep), Tool("f", "", {}, shown_parameters=[deep])):
        with pytest.raises(RequestError, match=r"tools\[0\].parameters: nested deeper"):
            render(
                [Message("user", "q")],
                tokenizer=TOKENIZER,
                record=chatml_record(),
                tools=[tool],
                tool_options=ToolOptions(dialect=name),
            )
