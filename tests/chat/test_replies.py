"""Replies told apart into text, thoughts and calls of tools."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwenkit.chat.dialects.spec import find
from qwenkit.chat.parse import ReplyCollector
from qwenkit.chat.replies import ReplyFormat
from qwenkit.types.completion import Reply, ReplyCall
from qwenkit.types.messages import Tool
from qwenkit.types.tools import ToolOptions

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
CODE = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}
TOOLS = (
    Tool("get_weather", "Weather of a city.", CITY),
    Tool("get_time", "The time.", {"type": "object", "properties": {}}),
    Tool("code_interpreter", "Runs Python.", CODE),
)
PARIS = '{"city": "Paris"}'


def call(arguments: str = PARIS, name: str = "get_weather", *, repaired: bool = False) -> ReplyCall:
    return ReplyCall(name, arguments, repaired=repaired)


def read(form: ReplyFormat, text: str, *, complete: bool = True) -> Reply:
    """The reply, the same however its text comes."""
    whole = form.parsed(text, complete=complete)
    for size in (1, 2, 3, 7):
        parser, collector = form.parser(), ReplyCollector()
        for start in range(0, len(text), size):
            collector.add(parser.push(text[start : start + size]))
        collector.add(parser.end(complete=complete))
        assert collector.reply() == whole, (size, text)
    return whole


def form(dialect: str, start: str = "", *, thinks: bool = False) -> ReplyFormat:
    return ReplyFormat(dialect=find(dialect), tools=TOOLS, start=start, thinks=thinks)


def hermes(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
TIME = '{"name": "get_time", "arguments": {}}'
HERMES = {
    "hi": Reply("hi"),
    hermes(WEATHER): Reply(tool_calls=(call(),)),
    f"Well.\n{hermes(WEATHER)}\n{hermes(TIME)}": Reply(
        "Well.", tool_calls=(call(), call("{}", "get_time"))
    ),
    hermes(WEATHER) + " done": Reply(" done", tool_calls=(call(),)),
    # a mark inside of a text is text, unless the text never ends
    hermes(WEATHER.replace("Paris", "a</tool_call>b")): Reply(
        tool_calls=(call('{"city": "a</tool_call>b"}'),)
    ),
    hermes('{"name": "get_weather", "arguments": {"city": "Paris') + "\nmore": Reply(
        "\nmore", tool_calls=(call('{"city": "Paris\\n"}', repaired=True),)
    ),
    # other shapes of the same
    hermes('{"arguments": {"city": "Paris"}, "name": "get_weather"}'): Reply(tool_calls=(call(),)),
    hermes(f"```json\n{WEATHER}\n```"): Reply(tool_calls=(call(),)),
    hermes(f"[{WEATHER},\n{TIME}]"): Reply(tool_calls=(call(), call("{}", "get_time"))),
    hermes(WEATHER + "}"): Reply(tool_calls=(call(),)),
    hermes(WEATHER[:-1]): Reply(tool_calls=(call(),)),
    hermes(WEATHER.replace("get_w", "Get_W")): Reply(tool_calls=(call(),)),
    # mended
    hermes(WEATHER.replace('"', "'")): Reply(tool_calls=(call(repaired=True),)),
    hermes(WEATHER.replace('"Paris"', "Paris,")): Reply(tool_calls=(call(repaired=True),)),
    hermes('{"name": "get_time"}'): Reply(tool_calls=(call("{}", "get_time", repaired=True),)),
    hermes('{"name": "code_interpreter", "arguments": "print(1)"}'): Reply(
        tool_calls=(call('{"code": "print(1)"}', "code_interpreter", repaired=True),)
    ),
    # no call
    "<tool_call>nothing</tool_call> more": Reply("<tool_call>nothing</tool_call> more"),
    "x <tool_call> y": Reply("x <tool_call> y"),
    "a <tool": Reply("a <tool"),
    hermes('{"name": 5, "arguments": {}}'): Reply(hermes('{"name": 5, "arguments": {}}')),
}


@pytest.mark.parametrize("text", HERMES)
def test_hermes(text: str) -> None:
    assert read(form("hermes"), text) == HERMES[text]


def test_a_hopeless_call_is_what_the_model_wrote() -> None:
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris" : 5 %%'
    broken = ReplyCall("get_weather", '{"city": "Paris" : 5 %%', complete=False)
    assert read(form("hermes"), text) == Reply(tool_calls=(broken,))


def test_a_call_that_was_cut_off_is_not_mended() -> None:
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par'
    cut = ReplyCall("get_weather", '{"city": "Par', complete=False)
    assert read(form("hermes"), text, complete=False) == Reply(tool_calls=(cut,))
    mended = call('{"city": "Par"}', repaired=True)
    assert read(form("hermes"), text) == Reply(tool_calls=(mended,))


def test_thoughts() -> None:
    thinking = form("hermes", thinks=True)
    said = f"<think>\nHm.\n\nYes.\n</think>\n\nWell.\n{hermes(WEATHER)}"
    assert read(thinking, said) == Reply("Well.", "Hm.\n\nYes.", (call(),))
    assert read(thinking, "Hi <think>") == Reply("Hi <think>")
    assert read(thinking, "<think>\nHm") == Reply("", "Hm")
    assert read(form("hermes", "<think>\n", thinks=True), "Hm\n</think>\n\nHi") == Reply("Hi", "Hm")
    begun = form("hermes", "It", thinks=True)
    assert read(begun, "<think> is") == Reply("<think> is")
    closed = form("hermes", "<think>\n\n</think>\n\n", thinks=True)
    assert read(closed, "Hi") == Reply("Hi")


QWEN = {
    '✿FUNCTION✿: get_weather\n✿ARGS✿: {"city": "Paris"}\n': Reply(tool_calls=(call(),)),
    'Ok.\n✿FUNCTION✿: get_weather\n✿ARGS✿: {"city": "Paris"}\n✿FUNCTION✿: get_time\n✿ARGS✿: {}': (
        Reply("Ok.", tool_calls=(call(), call("{}", "get_time")))
    ),
    "✿FUNCTION✿: code_interpreter\n✿ARGS✿:\n```py\nprint(1)\n```": Reply(
        tool_calls=(call('{"code": "print(1)"}', "code_interpreter", repaired=True),)
    ),
    "✿FUNCTION✿ x": Reply("✿FUNCTION✿ x"),
    "✿FUNCTION✿: get_time": Reply(tool_calls=(call("{}", "get_time", repaired=True),)),
    "✿FUNCTION✿: get_weather": Reply("✿FUNCTION✿: get_weather"),
}


@pytest.mark.parametrize("text", QWEN)
def test_qwen_fn(text: str) -> None:
    assert read(form("qwen_fn"), text) == QWEN[text]


def test_qwen_fn_goes_on() -> None:
    for text in (": Yes", ":Yes", "Yes"):
        assert read(form("qwen_fn", "✿RETURN✿"), text) == Reply("Yes")
    assert read(form("qwen_fn", "✿FUNCTION✿: a\n✿RESULT✿: 1\n✿RETURN✿: It"), " is") == Reply(" is")
    named = form("qwen_fn", "✿FUNCTION✿: get_time")
    assert read(named, "\n✿ARGS✿: {}") == Reply(tool_calls=(call("{}", "get_time"),))


REACT = {
    "hi": Reply("hi"),
    'Thought: Hm.\nAction: get_weather\nAction Input: {"city": "Paris"}\n': Reply(
        "Hm.", tool_calls=(call(),)
    ),
    "Thought: Hm.\nFinal Answer: sunny\n\nyes": Reply("sunny\n\nyes", "Hm."),
    "Thought: hm": Reply("Thought: hm"),
    'Action: get_weather\nAction Input: {"city": "Paris"}': Reply(tool_calls=(call(),)),
    "Thought: a\nAction: get_weather\nAction Input: Paris\n": Reply(
        "a", tool_calls=(call(repaired=True),)
    ),
    "Thought: a\nAction: None\nAction Input: None\n": (
        Reply("Thought: a\nAction: None\nAction Input: None\n")
    ),
    "Thought: a\nAction: get_time\n": Reply(
        "a", tool_calls=(call("{}", "get_time", repaired=True),)
    ),
}


@pytest.mark.parametrize("text", REACT)
def test_react(text: str) -> None:
    assert read(form("react"), text) == REACT[text]


def test_react_goes_on() -> None:
    text = " I know.\nFinal Answer: done"
    assert read(form("react", "Thought:"), text) == Reply("done", "I know.")


XML = {
    'Ok.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nPa"ris\n\n</parameter>\n'
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>": Reply(
        "Ok.", tool_calls=(call('{"city": "Pa\\"ris\\n", "days": 2}'),)
    ),
    "<tool_call>\n<function=get_time>\n</function>\n</tool_call>\n": Reply(
        tool_calls=(call("{}", "get_time"),)
    ),
    # the outer mark is missing; a value that is no number; a value that never ends
    "<function=get_time>\n</function>": Reply(tool_calls=(call("{}", "get_time"),)),
    "<tool_call>\n<function=get_weather>\n<parameter=days>\ntwo\n</parameter>\n</function>": Reply(
        tool_calls=(call('{"days": "two"}', repaired=True),)
    ),
    "<tool_call>\n<function=get_weather>\n<parameter=days>\nTrue\n</parameter>\n</function>": Reply(
        tool_calls=(call('{"days": true}', repaired=True),)
    ),
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</function>\n</tool_call> x": (
        Reply(" x", tool_calls=(call(repaired=True),))
    ),
    "<tool_call>\n<function=run>\n<parameter=code>\n</function>\n</tool_call>\n</parameter>\n"
    "</function>": Reply(tool_calls=(call('{"code": "</function>\\n</tool_call>"}', "run"),)),
    "<tool_call>\n<function=get_time>\nHm.": Reply(
        "\nHm.", tool_calls=(call("{}", "get_time", repaired=True),)
    ),
    # no call
    "<function=strange>\n</function>": Reply("<function=strange>\n</function>"),
    "<tool_call>{}</tool_call>": Reply("<tool_call>{}</tool_call>"),
    "<tool_call>\n<function=\n": Reply("<tool_call>\n<function=\n"),
}


@pytest.mark.parametrize("text", XML)
def test_qwen_xml(text: str) -> None:
    assert read(form("qwen_xml"), text) == XML[text]


def test_xml_that_was_cut_off_is_not_mended() -> None:
    begin = "<tool_call>\n<function=get_weather>\n<parameter=city>\nPar"
    for text, arguments in (
        (begin, '{"city": "Par'),
        (begin + "\n</parameter>\n<pa", '{"city": "Par"'),
    ):
        cut = ReplyCall("get_weather", arguments, complete=False)
        assert read(form("qwen_xml"), text, complete=False) == Reply(tool_calls=(cut,))


@pytest.mark.parametrize("dialect", ["hermes", "qwen_xml"])
def test_a_reply_that_goes_on_with_a_call(dialect: str) -> None:
    whole = {
        "hermes": hermes(WEATHER),
        "qwen_xml": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "</function>\n</tool_call>",
    }[dialect]
    for at in range(len("<tool_call>"), len(whole) - len("</tool_call>")):
        assert form(dialect, whole[:at]).parsed(whole[at:]) == Reply(tool_calls=(call(),)), at


def test_one_call_is_enough_where_there_may_be_one() -> None:
    one = replace(form("hermes"), options=ToolOptions(parallel=False))
    assert one.stops == ("</tool_call>",)
    more = f"\n{hermes(TIME)}"
    assert read(one, hermes(WEATHER) + more) == Reply(more, tool_calls=(call(),))
    two = "✿FUNCTION✿: get_time\n✿ARGS✿: {}\n"
    single = replace(form("qwen_fn"), options=ToolOptions(parallel=False))
    assert read(single, two * 2) == Reply(f"\n{two}", tool_calls=(call("{}", "get_time"),))
