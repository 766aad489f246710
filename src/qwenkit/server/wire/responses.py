"""What /v1/responses takes and answers: text and function tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from qwenkit.server.wire.base import Few, Many, Shape, Wire
from qwenkit.server.wire.chat import Name, PromptDetails, TokenLogprob
from qwenkit.server.wire.generation import MOST_LOGPROBS, MOST_SEED, Text

_NOTHING_KEPT = "nothing is stored here; send the whole conversation as `input`."
Status = Literal["in_progress", "completed", "incomplete"]


class ContentPart(Wire):
    """A piece of a message's text."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Few[Any] | None = None
    logprobs: Many[Any] | None = None


class RefusedPart(Wire):
    """A piece of a reply that another model refused with."""

    type: Literal["refusal"]
    refusal: str


class MessageItem(Wire):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Few[ContentPart | RefusedPart]
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class CallItem(Wire):
    """A call that the assistant made."""

    type: Literal["function_call"]
    call_id: Text
    name: Name
    arguments: str
    id: str | None = None
    status: Status | None = None


class OutputItem(Wire):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Text
    output: str | Few[ContentPart]
    id: str | None = None
    status: Status | None = None


class ThoughtPart(Wire):
    """A piece of a thought."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ThoughtItem(Wire):
    """What the assistant thought before the next item."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Few[ThoughtPart] = Field(default_factory=list)
    content: Few[ThoughtPart] | None = None
    encrypted_content: None = None
    status: Status | None = None


def _kind(item: Any) -> str | None:
    """An item's type; a message need not name it."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ThoughtItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(Wire):
    """A function that may be called."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Wire):
    """The function that must be called."""

    type: Literal["function"]
    name: Name


class TextFormat(Wire):
    """Any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextSettings(Wire):
    """What the text must be."""

    refused: ClassVar[Mapping[str, str]] = {
        "verbosity": "these models have no such setting; ask for it in the instructions.",
    }

    format: TextFormat | None = None


class ResponsesStreamOptions(Wire):
    """What a stream tells beside the text."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Wire):
    """A conversation, and how to go on with it."""

    refused: ClassVar[Mapping[str, str]] = {
        "previous_response_id": _NOTHING_KEPT,
        "conversation": _NOTHING_KEPT,
        "prompt": "there are no stored prompts here; send it as `input`.",
        "reasoning": "these models have no such setting; leave it out.",
        "max_tool_calls": "this server calls no tools by itself; leave it out.",
        "context_management": "a context is never cut here; leave it out.",
        "prompt_cache_retention": "the cache keeps what it has room for; leave it out.",
    }

    model: str | None = None
    input: str | Annotated[Many[InputItem], Field(min_length=1)]
    instructions: str | None = Field(None, description="Stands before the input as system message.")
    max_output_tokens: int | None = Field(None, ge=1, le=MOST_SEED)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MOST_SEED)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=0, le=MOST_SEED)
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    tools: Few[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    include: Few[Literal["message.output_text.logprobs"]] | None = None
    truncation: Literal["disabled"] | None = Field(None, description="A prompt is never cut.")
    store: Literal[False] | None = Field(None, description="Nothing is stored here.")
    background: Literal[False] | None = None
    metadata: dict[str, str] | None = Field(None, description="Given back with the answer.")
    service_tier: Literal["auto", "default"] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    safety_identifier: Annotated[str, Field(max_length=256)] | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[Text, Any] | None = None
    timeout_s: float | None = Field(None, gt=0, le=1e9)
    priority: int | None = Field(None, ge=-(10**6), le=10**6)
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class AnsweredText(Shape):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class AnsweredThought(Shape):
    """The text of a thought."""

    type: Literal["reasoning_text"]
    text: str


class AnsweredItem(Shape):
    """A message, a thought or a call."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Status
    role: Literal["assistant"] | None = None
    content: list[AnsweredText | AnsweredThought] | None = None
    summary: list[Any] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class OutputDetails(Shape):
    """Thoughts are not counted apart."""

    reasoning_tokens: int


class ResponsesUsage(Shape):
    """Token counts."""

    input_tokens: int
    input_tokens_details: PromptDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(Shape):
    """Why an answer is not complete."""

    reason: str


class ResponsesAnswer(Shape):
    """The whole answer."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    background: Literal[False]
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[AnsweredItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, None]
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponsesUsage | None
    user: str | None
    metadata: dict[str, str]
