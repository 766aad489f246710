"""What /v1/chat/completions takes and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from qwenkit.server.wire.base import Few, Many, Shape, Wire
from qwenkit.server.wire.generation import MOST_LOGPROBS, MOST_SEED, GenerationFields, Text

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
FinishReason = Literal[
    "stop", "length", "tool_calls", "function_call", "language", "loop", "timeout", "abort"
]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class TextPart(Wire):
    """A piece of a message's text. Other kinds of parts are refused: these models read text."""

    type: Literal["text"]
    text: str


class RefusalPart(Wire):
    """A piece of a reply that another model refused with."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class FunctionCall(Wire):
    """A function's name, and its arguments as JSON text or as an object."""

    name: Name
    arguments: str | dict[str, Any] = "{}"
    parsed_arguments: Any = Field(None, description="As the openai client adds it; not used.")


class ToolCall(Wire):
    """One call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(None, description="As in a stream; not used.")


class ChatMessage(Wire):
    """One message. "developer" is another word for "system", "function" the old one for "tool"."""

    refused: ClassVar[Mapping[str, str]] = {
        "audio": "these models neither hear nor speak.",
    }

    role: Role
    content: str | Few[Part] | None = None
    name: str | None = None
    tool_calls: Few[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    reasoning_content: str | None = None
    refusal: str | None = Field(None, description="Of a reply given back; read as its content.")
    annotations: Few[Any] | None = Field(None, description="Of a reply given back; not used.")
    parsed: Any = Field(None, description="As the openai client adds it to a reply; not used.")
    id: str | None = Field(
        None, description="Of a tool's result: its call, as qwen-agent names it for tool_call_id."
    )
    extra: dict[str, Any] | None = Field(None, description="qwen-agent's own notes; not used.")


class FunctionDefinition(Wire):
    """A function that may be called; `parameters` is a JSON schema, or Qwen's own list of
    parameters.
    """

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | Few[dict[str, Any]] | None = None
    strict: bool | None = Field(None, description="The arguments keep to the schema, always.")


class ToolDefinition(Wire):
    """A tool that may be called: always a function."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Wire):
    """A function by its name."""

    name: Name


class NamedTool(Wire):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class QwenFunction(Wire):
    """A function of the old `functions`, in OpenAI's words or in Qwen's own."""

    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | Few[dict[str, Any]] | None = None
    name_for_human: str | None = None
    name_for_model: str | None = None
    description_for_model: str | None = None
    args_format: str | None = None


class JsonSchemaFormat(Wire):
    """A schema that the output keeps to the letter, whether `strict` or not."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextFormat(Wire):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Wire):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Wire):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")
]
_NOT_STORED = "nothing is stored here; leave it out."


class ChatRequest(GenerationFields):
    """A conversation, and how to go on with it."""

    refused: ClassVar[Mapping[str, str]] = {
        "audio": "these models neither hear nor speak; leave it out.",
        "web_search_options": "this server does not search the web; leave it out.",
        "prediction": "not supported: start the server with --speculation prompt-lookup instead.",
        "reasoning_effort": "these models have no such setting; leave it out.",
        "verbosity": "these models have no such setting; ask for it in a message.",
        "metadata": _NOT_STORED,
        "moderation": "there is no moderation here; leave it out.",
        "prompt_cache_retention": "the cache keeps what it has room for; leave it out.",
    }

    messages: Annotated[Many[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_SEED)
    max_tokens: int | None = Field(None, ge=1, le=MOST_SEED)
    max_length: int | None = Field(
        None,
        ge=1,
        le=MOST_SEED,
        description="The first generation's name for the length of prompt and answer together.",
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Few[ToolDefinition] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: Few[QwenFunction] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(
        None, description="Default: true where the last message is an assistant's text."
    )
    chat_template_kwargs: dict[Text, Any] | None = None
    store: Literal[False] | None = Field(None, description="Nothing is stored here.")
    modalities: Few[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="As `user`, where that is left out."
    )
    prompt_cache_key: str | None = Field(
        None, description="All requests share one cache, so this is kept to whatever it says."
    )


class TopLogprob(Shape):
    """A token that might have come."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Shape):
    """A token that came, and the most likely ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Shape):
    """Natural log-probabilities before temperature and filters."""

    content: list[TokenLogprob] | None
    refusal: None = None


class AnsweredFunction(Shape):
    """The function that is called."""

    name: str
    arguments: str


class AnsweredCall(Shape):
    """A tool that is called."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnsweredMessage(Shape):
    """The reply."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[AnsweredCall] | None = None
    function_call: AnsweredFunction | None = None


class ChatChoice(Shape):
    """One of the `n` answers. `stop_reason` is the stop string or token that ended it."""

    index: int
    message: AnsweredMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None


class PromptDetails(Shape):
    """What of the prompt was not computed again."""

    cached_tokens: int


class UsageShape(Shape):
    """Token counts of all answers; their common prompt is counted once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatAnswer(Shape):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: Literal["default"] | None = None
    choices: list[ChatChoice]
    usage: UsageShape
