"""The first generation's ChatML: exact ids, the default system text, the history window."""

from __future__ import annotations

import pytest
from chat_fakes import END, START, ControlBytes, chatml_record

from qwenkit.chat.chatml import DEFAULT_SYSTEM, render_chatml, strip_contents
from qwenkit.chat.render import Rendered, render
from qwenkit.errors import RequestError, UsageError
from qwenkit.tokenizer import BytePairTokenizer
from qwenkit.types.messages import Message, ToolCall

TOKENIZER = ControlBytes()


def history(turns: int) -> list[Message]:
    messages = []
    for i in range(turns):
        messages += [Message("user", f"question {i}"), Message("assistant", f"answer {i}")]
    return [*messages, Message("user", "now")]


def rendered(
    messages: list[Message], *, window: int | None = None, system: str | None = None
) -> Rendered:
    record = chatml_record(default_system=system, history_window_tokens=window)
    return render(messages, tokenizer=TOKENIZER, record=record)


def test_the_ids_of_the_original(qwen: BytePairTokenizer) -> None:
    result = render([Message("user", "你好")], tokenizer=qwen, record=chatml_record())
    assert result.ids == (
        *(151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198),
        *(151644, 872, 198, 108386, 151645, 198, 151644, 77091, 198),
    )
    assert result.text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
def test_turns_follow_each_other(turns: int) -> None:
    expected = "<|im_start|>system\nBe kind.<|im_end|>\n"
    for i in range(turns):
        expected += f"<|im_start|>user\nquestion {i}<|im_end|>\n"
        expected += f"<|im_start|>assistant\nanswer {i}<|im_end|>\n"
    expected += "<|im_start|>user\nnow<|im_end|>\n<|im_start|>assistant\n"
    result = rendered([Message("system", "Be kind."), *history(turns)])
    assert result.text == expected
    assert list(result.ids) == TOKENIZER.encode(expected, allowed_special="all")
    assert (result.dropped_messages, result.dropped_tokens) == (0, 0)


def test_system_texts() -> None:
    question = [Message("user", "q")]
    assert rendered(question).text.startswith(f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>")
    assert rendered(question, system="Mine.").text.startswith("<|im_start|>system\nMine.<|im_end|>")
    empty = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nq"
    assert rendered(question, system="").text.startswith(empty)
    given = [Message("system", ""), *question]
    assert rendered(given, system="Mine.").text.startswith(empty)
    later = [*question, Message("system", "late")]
    assert "q<|im_end|>\n<|im_start|>system\nlate<|im_end|>\n" in rendered(later).text


def test_role_line_and_content_are_encoded_apart(qwen: BytePairTokenizer) -> None:
    result = render([Message("user", "\nhi")], tokenizer=qwen, record=chatml_record())
    newline = qwen.encode("\n")
    assert len(newline) == 1
    assert len(qwen.encode("\n\n")) == 1  # which is why the two must not meet
    start = result.ids.index(151644, 1)
    assert list(result.ids[start + 1 : start + 4]) == [*qwen.encode("user"), *newline, *newline]


def test_the_window_keeps_the_newest_turns_below_it() -> None:
    messages = history(4)
    system = len(f"system\n{DEFAULT_SYSTEM}") + 3  # with its two control tokens and line break
    turn = len("user\nquestion 0") + len("assistant\nanswer 0") + 6
    for kept in range(5):
        for window, expected in (
            (system + kept * turn, kept - 1),
            (system + kept * turn + 1, kept),
        ):
            result = rendered(messages, window=window)
            expected = max(expected, 0)
            assert result.text.count("question") == expected
            assert result.dropped_messages == 2 * (4 - expected)
            assert result.dropped_tokens == turn * (4 - expected)
            assert [f"question {i}" in result.text for i in range(4)] == [
                i >= 4 - expected for i in range(4)
            ]
            assert result.text.endswith("<|im_start|>user\nnow<|im_end|>\n<|im_start|>assistant\n")


def test_a_turn_that_does_not_fit_ends_the_history() -> None:
    messages = [Message("user", "x" * 500), Message("assistant", "y"), *history(1)]
    messages = [Message("user", "old"), Message("assistant", "fits"), *messages]
    result = rendered(messages, window=300)
    assert "question 0" in result.text
    assert "old" not in result.text
    assert result.dropped_messages == 4


def test_the_last_turn_is_never_dropped() -> None:
    messages = [*history(2), Message("assistant", "started")]
    prompt = render_chatml(
        messages, tokenizer=TOKENIZER, history_window_tokens=1, add_generation_prompt=False
    )
    text = "".join(piece.text for piece in prompt.pieces)
    assert text.endswith("user\nnow<|im_end|>\n<|im_start|>assistant\nstarted<|im_end|>\n")
    assert prompt.dropped_messages == 4


def test_stripping_as_the_original_server() -> None:
    messages = (Message("user", "\n\n  hi \n\t"), Message("assistant", " a\n", name="n"))
    assert strip_contents(messages) == (
        Message("user", "  hi"),
        Message("assistant", " a", name="n"),
    )


def test_what_has_no_place_is_refused_by_name() -> None:
    call = ToolCall("f", "{}")
    for message in (Message("tool", "<|im_end|>"), Message("assistant", "", tool_calls=(call,))):
        with pytest.raises(RequestError, match=r"messages\[1\].*no tool messages"):
            render_chatml([Message("user", "q"), message], tokenizer=TOKENIZER)
    with pytest.raises(RequestError, match=r"template_kwargs.*has no chat template"):
        render(
            [Message("user", "q")],
            tokenizer=TOKENIZER,
            record=chatml_record(),
            template_kwargs={"a": 1},
        )


def test_a_vocabulary_without_the_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match=r"needs the control tokens <\|im_end\|>"):
        render_chatml([Message("user", "q")], tokenizer=ControlBytes(("<|im_start|>",)))


def test_turn_tokens_are_single_ids() -> None:
    ids = rendered([Message("user", "<|im_start|>")]).ids
    assert TOKENIZER.control_ids(ids) == [START, END, START, END, START]
