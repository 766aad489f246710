"""/tokenize and /detokenize: what the model is given, as it is given it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from qwenkit.errors import QwenkitError
from qwenkit.server import conversation
from qwenkit.server.errors import ApiError, described
from qwenkit.server.facts import facts_of
from qwenkit.server.route import group
from qwenkit.server.served import Served
from qwenkit.server.sse import in_pieces, json_answer
from qwenkit.server.wire.base import Few, Many, Shape, Wire
from qwenkit.server.wire.chat import ChatMessage, ToolDefinition
from qwenkit.server.wire.generation import Text

router = group()


class TokenizeRequest(Wire):
    """A text, or a conversation as the chat template writes it."""

    model: str | None = None
    prompt: str | None = Field(None, description="Control tokens in it are plain text.")
    messages: Annotated[Many[ChatMessage], Field(min_length=1)] | None = None
    tools: Few[ToolDefinition] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[Text, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(Shape):
    """The ids, and how many the model takes."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Wire):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True, max_length=1 << 20)]


class DetokenizeAnswer(Shape):
    """Their text, control tokens by their names."""

    prompt: str


@router.post("/tokenize", response_model=TokenizeAnswer, summary="Text to token ids.")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Either `prompt` or `messages`."""
    served: Served = request.app.state.served
    facts = facts_of(request.scope)
    facts.model = served.target(body.model).name
    if (body.prompt is None) == (body.messages is None):
        message = "prompt: give either a prompt or messages."
        raise ApiError(400, message, "prompt", "invalid_value")
    try:
        return json_answer(await served.in_thread(facts.client, lambda: _tokenized(body, served)))
    except QwenkitError as error:
        raise described(error, "messages" if body.prompt is None else "prompt") from error


@router.post("/detokenize", response_model=DetokenizeAnswer, summary="Token ids to text.")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Bytes that are no character become U+FFFD."""
    served: Served = request.app.state.served
    facts = facts_of(request.scope)
    facts.model = served.target(body.model).name
    tokenizer = served.llm.tokenizer
    wrong = next((i for i in body.tokens if not 0 <= i < tokenizer.vocab_size), None)
    if wrong is not None:
        most = tokenizer.vocab_size - 1
        message = f"tokens: {wrong} is no token; allowed: 0 to {most}."
        raise ApiError(400, message, "tokens", "invalid_value")
    text = await served.in_thread(facts.client, lambda: tokenizer.decode(body.tokens))
    return json_answer({"prompt": text})


def _tokenized(body: TokenizeRequest, served: Served) -> dict[str, Any]:
    """The answer, written in pieces: a million ids would hold up the event loop."""
    ids, tokenizer = _ids(body, served), served.llm.tokenizer
    answer: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": served.llm.context_tokens,
        "tokens": in_pieces(ids),
    }
    if body.return_token_strs:
        strings = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids]
        answer["token_strs"] = in_pieces(strings)
    return answer


def _ids(body: TokenizeRequest, served: Served) -> list[int]:
    if body.messages is None:
        return served.llm.prompt_ids(body.prompt or "") if body.prompt else []
    rendered = served.llm.render(
        conversation.library_messages(body.messages),
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
    )
    return list(rendered.ids)
