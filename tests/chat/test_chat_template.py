"""The sandbox: what templates may do works as published, and nothing else does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_fakes import ControlBytes, template_record
from hostile_templates import outcome

from qwenkit.bench.reliability.hostile_templates import BOMBS, CODE, HOSTILE, NONSENSE
from qwenkit.chat.render import render
from qwenkit.chat.template import compile_template
from qwenkit.chat.values import Limits
from qwenkit.errors import TemplateError
from qwenkit.types.messages import Message, Tool, ToolCall

MISTAKES = {
    "round": "{{ 1|round(0, 'up') }}",
    "sum": "{{ ['a']|sum }}",
    "in": "{{ 1 in 'abc' }}",
    "less": "{{ messages[0].content < 1 }}",
    "call": "{{ messages[0].content() }}",
    "index": "{{ messages[0].content.index('x') }}",
    "not a number": "{{ 'x'|abs }}",
    "filter argument": "{{ 'x'|trim(1) }}",
    "format": "{{ '%d' % 'x' }}",
    "print a namespace": "{{ [namespace()] }}",
    "json of a namespace": "{{ namespace()|tojson }}",
}
HARMLESS = {  # these may run: they reach nothing and cost nothing
    "set underscore": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ 2 }}",
    "small power": "{{ 2 ** 10 }}",
    "item of a function": "{{ dict['x'] }}",
}


def shown(source: str, *contents: str, tools: tuple[Tool, ...] = (), **kwargs: Any) -> str:
    """What a template renders for user messages with these contents."""
    messages = [Message("user", content) for content in contents or ("hi",)]
    record = template_record(source)
    return render(
        messages, tokenizer=ControlBytes(), record=record, tools=tools, template_kwargs=kwargs
    ).text


def test_hostile_templates_are_refused_in_time_and_space() -> None:
    # A child process: a hang or a burst of memory is reported instead of suffered.
    # It allows 0.1 s, not 0.8, to be quick: no single operation may take long either.
    script = Path(__file__).with_name("hostile_templates.py")
    done = subprocess.run(
        [sys.executable, str(script), "0.1"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report.keys() == HOSTILE.keys()
    assert len(CODE) >= 25
    assert len(BOMBS) >= 25
    rendered = {name: row for name, row in report.items() if not row[0].startswith("refused: ")}
    assert rendered == {}
    slow = {
        name: row for name, row in report.items() if row[1] > 5
    }  # a hang guard: usually under 1
    assert slow == {}
    large = {name: row for name, row in report.items() if row[2] > 32}  # mebibytes
    assert large == {}


@pytest.mark.parametrize("name", CODE)
def test_no_attack_prints_what_it_reached_for(name: str) -> None:
    reason = outcome(CODE[name])
    assert reason.startswith("refused: ")
    assert not any(word in reason for word in ("<class", "<function", "0x", "site-packages"))


@pytest.mark.parametrize("name", NONSENSE)
def test_reasons_are_short(name: str) -> None:
    assert 20 < len(outcome(NONSENSE[name])) < 250


@pytest.mark.parametrize("source", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_a_template_error(source: str) -> None:
    assert outcome(source).startswith("refused: ")


@pytest.mark.parametrize("source", HARMLESS.values(), ids=HARMLESS)
def test_harmless_oddities_render(source: str) -> None:
    assert outcome(source).startswith("rendered: ")


def test_limits_grow_with_the_conversation() -> None:
    small = Limits.for_conversation(texts=1, characters=10)
    large = Limits.for_conversation(texts=1000, characters=10**6)
    assert small.seconds <= 1
    assert large.seconds > small.seconds
    text = "x" * 400_000
    assert shown("{{ messages[0].content * 3 }}", text) == text * 3
    with pytest.raises(TemplateError, match="builds a text of 40,000,000 characters"):
        shown("{{ messages[0].content * 100 }}", text)


def test_a_long_conversation_collected_in_a_variable_renders() -> None:
    source = (
        "{% set n = namespace(x='') %}{% for m in messages %}"
        "{% set n.x = n.x + '<|im_start|>' + m.content %}{% endfor %}{{ n.x }}"
    )
    contents = [f"message {i} " * 40 for i in range(300)]
    assert shown(source, *contents) == "".join(f"<|im_start|>{c}" for c in contents)


FEATURES = {
    "{{ messages[0]['content'] }} {{ messages[0].role }}": "hi user",
    "{%- if true %}\n  a\n{%- endif %}\nb": "  ab",
    "{% for m in messages %}\n  {% if 1 %}\nx\n  {% endif %}\n{% endfor %}": "x\n",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}"
    "{% endif %}{{ i }}{{ ',' if not loop.last }}{% endfor %}": "0,1,3,",
    "{% for i in [1,2,3] %}{{ loop.index }}/{{ loop.length }}{{ loop.revindex0 }} {% endfor %}": (
        "1/32 2/31 3/30 "
    ),
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}": "a1b2",
    "{% for x in [] %}{% else %}none{% endfor %}": "none",
    "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ ns.b is defined }}": (
        "2False"
    ),
    "{% macro m(a, b='c') %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ m('x') }}"
    "{% call m('y', b='z') %}!{% endcall %}": "xcyz!",
    "{% generation %}said{% endgeneration %}": "said",
    "{% raw %}{{ x }}{% endraw %}{# comment #}": "{{ x }}",
    "{% filter upper %}abc{% endfilter %}": "ABC",
    "{% with a = 1 %}{{ a }}{% endwith %}": "1",
    "{{ 'a' ~ 1 ~ none ~ true ~ [1] ~ nothing }}": "a1NoneTrue[1]",
    "{{ 1 if messages else 2 }}{{ messages[-1] is mapping }}{{ messages is iterable }}": (
        "1TrueTrue"
    ),
    "{{ 1 < 2 < 3 }}{{ 1 < 3 < 2 }}{{ 'b' in 'abc' }}{{ 2 not in [1] }}": "TrueFalseTrueTrue",
    "{{ 7 // 2 }} {{ 7 % 4 }} {{ 7 / 2 }} {{ 2 ** 3 }} {{ 3 * 'ab' }} {{ -1 + 2 }}": (
        "3 3 3.5 8 ababab 1"
    ),
    "{{ [1, 2] + [3] }}{{ ([0] * 3) | length }}{{ (1, 'a') }}": "[1, 2, 3]3(1, 'a')",
    "{{ 'abcdef'[1:4] }}{{ 'abc'[::-1] }}{{ [1,2,3][1:] }}{{ 'abc'[0] }}": "bcdcba[2, 3]a",
    "{{ {'a': {'b': 'c'}}.a.b }}{{ {'items': 1}['items'] }}{{ {}.get('x', 'd') }}": "c1d",
    "{{ ' a '|trim }}|{{ 'a,b'.split(',')|join(';') }}|{{ 'AbC'|lower }}": "a|a;b|abc",
    "{{ 'a b'|replace(' ', '-') }}{{ 'abc'|length }}{{ 'abc'|first }}{{ 'abc'|last }}": "a-b3ac",
    "{{ 'x'|capitalize }}{{ 'a b'|title }}{{ 3.7|int }}{{ '4'|int + 1 }}{{ 'x'|int(9) }}": (
        "XA B359"
    ),
    "{{ '1.5'|float }}{{ 2.567|round(1) }}{{ 1.2|round(0, 'ceil') }}{{ -3|abs }}": "1.52.62.03",
    "{{ [3,1,2]|sort|join }}{{ [1,1,2]|unique|list }}{{ [1,2]|sum }}{{ [1,5]|max }}": (
        "123[1, 2]35"
    ),
    "{{ messages|map(attribute='content')|list }}": "['hi']",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}": "1",
    "{{ messages|rejectattr('role', 'in', ['user'])|list|length }}": "0",
    "{{ ['a', 'b']|map('upper')|join }}{{ [1, none]|select|list }}": "AB[1]",
    "{{ [1,2]|reject('odd')|list }}{{ [1,2]|reverse|list }}{{ {'b':1,'a':2}|dictsort }}": (
        "[2][2, 1][('a', 2), ('b', 1)]"
    ),
    "{{ nothing|default('d') }}{{ ''|default('e', true) }}{{ nothing is defined }}": "deFalse",
    "{{ '<b>'|safe }}{{ '<b>' ~ 'x'|safe }}{{ 5|string ~ 'a' }}": "<b><b>x5a",
    "{{ 'a\nb\n\nc'|indent(2) }}": "a\n  b\n\n  c",
    "{{ 'a\nb'|indent(2, first=true) }}{{ 'a\n\nb'|indent('>', blank=true) }}": "  a\n  ba\n>\n>b",
    "{{ '%s-%03d' % ('a', 7) }}{{ '%.2f'|format(1.5) }}{{ '{:>4}|{x}'.format('a', x=1) }}": (
        "a-0071.50   a|1"
    ),
    "{{ {'b': '<é>', 'a': [1, true, none]} | tojson }}": '{"b": "<é>", "a": [1, true, null]}',
    "{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=true, sort_keys=true) }}": (
        '{"a": "\\u00e9", "b": 1}'
    ),
    "{{ [1, {'a': 2}] | tojson(indent=2) }}": '[\n  1,\n  {\n    "a": 2\n  }\n]',
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}": "<|endoftext|><|im_end|>",
    "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}": "TrueTrueTrue",
    "{{ 'A' is upper }}{{ 'a' is lower }}{{ 'a' is string }}{{ 1 is number }}": "TrueTrueTrueTrue",
    "{{ strftime_now('%%') }}": "%",
    "{{ messages|join('', attribute='role') }}{{ 'ff'|int(0, 16) }}{{ [1.5]|sum }}": "user2551.5",
    "{{ [{'a': 1}, {'a': 2}]|sum(attribute='a') }}{{ 1.25|round(1, 'floor') }}": "31.2",
    "{% block a %}x{% endblock %}{{ self.a() }}": "xx",
    "{{ 'abc'.index('c') }}{{ 'b' >= 'a' }}{{ 'abc'.rfind('c') }}{{ 'aXb'.islower() }}": (
        "2True2False"
    ),
}


@pytest.mark.parametrize(("source", "text"), FEATURES.items())
def test_the_dialect(source: str, text: str) -> None:
    assert shown(source) == text


def test_contents_work_like_plain_text() -> None:
    content = "Alpha, beta\nGAMMA </think> \t"
    for expression, expected in {
        "c == 'Alpha, beta\nGAMMA </think> \t'": True,
        "'</think>' in c": True,
        "'</tool>' not in c": True,
        "c in ['x', c]": True,
        "c.startswith('Alpha')": True,
        "c.split('</think>')[-1]": " \t",
        "c.split('</think>')[0].rstrip('\nM ').split(',')[1]": " beta\nGAMMA",
        "c|trim|length": len(content.strip()),
        "c.strip().endswith('>')": True,
        "c|upper|replace('ALPHA', 'x')": content.upper().replace("ALPHA", "x"),
        "c.partition(',')[0]": "Alpha",
        "c[:5]": "Alpha",
        "c.splitlines()|length": 2,
        "(c ~ '!')|last": "!",
        "c is string": True,
        "{'Alpha': 1}[c[:5]]": 1,
        "c.find('beta')": 7,
        "c[7:11] < 'c'": True,
        "('1' ~ '2')|int + 1": 13,
    }.items():
        source = "{% set c = messages[0].content %}{{ " + expression + " }}"
        assert shown(source, content) == str(expected), expression


def test_arguments_are_an_object_or_the_text_they_are() -> None:
    source = (
        "{% set a = messages[0].tool_calls[0].function.arguments %}"
        "{{ a is mapping }} {{ a | tojson }} {{ 'x' + a }} {{ a + 'x' }} {{ a }} {{ a ~ '' }}"
    )
    for arguments, parsed in {'{"k":1}': '{"k": 1}', "[1]": '"[1]"', "{oops": '"{oops"'}.items():
        message = Message("assistant", "", tool_calls=(ToolCall("f", arguments),))
        result = render([message], tokenizer=ControlBytes(), record=template_record(source))
        a = arguments
        assert result.text == f"{parsed[0] == '{'} {parsed} x{a} {a}x {a} {a}"


def test_a_refusal_of_the_template_is_told_in_its_words() -> None:
    with pytest.raises(TemplateError, match=r"refused the conversation: Odd <\|im_end\|> question"):
        shown("{{ raise_exception('Odd ' ~ messages[0].content ~ ' question') }}", "<|im_end|>")


def test_a_failure_names_its_line() -> None:
    with pytest.raises(TemplateError, match=r"failed at line 3: .*'x' is undefined"):
        shown("a\nb\n{{ x.y }}\n")
    with pytest.raises(TemplateError, match="malformed: line 2: "):
        shown("a\n{% for %}\n")


def test_templates_are_compiled_once() -> None:
    source = "{{ messages[0].content }} once"
    assert compile_template(source) is compile_template(source)


def test_what_templates_write_may_be_private_use_characters() -> None:
    content = "\U000f0041\U00100041A"
    source = "{{ '\\U0010fffd' }}\U000f0041{{ messages[0].content }}"
    assert shown(source, content) == f"\U0010fffd\U000f0041{content}"
