"""What Ollama's endpoints take and answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from qwenkit.server.wire.base import Few, Many, Shape, Wire
from qwenkit.server.wire.chat import Name, ToolDefinition
from qwenkit.server.wire.embeddings import Texts
from qwenkit.server.wire.generation import MOST_SEED, Penalty, Text

_LOADING = "it is set when the server starts, not by a request; leave it out."
_OF_LOADING = (
    *("num_thread", "num_gpu", "num_batch", "main_gpu", "low_vram", "f16_kv"),
    *("use_mmap", "use_mlock", "numa", "vocab_only"),
)
_NO_IMAGES = "these models read text only; leave it out."
Format = Literal["json", ""] | dict[str, Any]
KeepAlive = str | float
Off = Annotated[float, Field(ge=1, le=1)]
VERSION = "0.12.0"  # of Ollama's API that these endpoints follow


class OllamaOptions(Wire):
    """How to sample. What is left out is as the model's own defaults have it."""

    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(_OF_LOADING, _LOADING)

    temperature: float | None = Field(None, ge=0, le=100)
    top_k: int | None = Field(None, ge=0, le=MOST_SEED)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0, le=MOST_SEED)
    num_predict: int | None = Field(
        None, ge=-2, le=MOST_SEED, description="-1 and -2: to the end of the context."
    )
    num_ctx: int | None = Field(
        None, ge=1, le=MOST_SEED, description="Up to the context that the server was started with."
    )
    num_keep: int | None = Field(
        None, ge=-1, le=MOST_SEED, description="Nothing of a prompt is ever dropped."
    )
    repeat_penalty: float | None = Field(None, gt=0, le=100)
    repeat_last_n: Literal[-1] | None = Field(None, description="The penalty sees the whole text.")
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: Text | Few[Text] | None = None
    mirostat: Literal[0] | None = Field(None, description="Not supported; 0 is off.")
    typical_p: Off | None = Field(None, description="Not supported; 1 is off.")
    tfs_z: Off | None = Field(None, description="Not supported; 1 is off.")
    penalize_newline: Literal[True] | None = Field(None, description="As any other token.")


class OllamaFunction(Wire):
    """A function that was called, and its arguments."""

    name: Name
    arguments: dict[str, Any] = Field(default_factory=dict)
    index: int | None = None
    description: str | None = None


class OllamaCall(Wire):
    """A call in an assistant's message."""

    function: OllamaFunction
    id: str | None = None
    type: Literal["function"] | None = None


class OllamaMessage(Wire):
    """One message."""

    refused: ClassVar[Mapping[str, str]] = {"images": _NO_IMAGES}

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: Few[OllamaCall] | None = None
    tool_name: str | None = None
    name: str | None = None
    tool_call_id: str | None = None


class OllamaFields(Wire):
    """What both ways of asking have in common."""

    model: Text
    stream: bool | None = Field(None, description="Left out: true.")
    format: Format | None = Field(None, description='"json", or a schema that the answer keeps.')
    options: OllamaOptions | None = None
    keep_alive: KeepAlive | None = Field(
        None, description="The model stays loaded as long as the server runs; 0 is refused."
    )
    think: bool | None = None
    truncate: Literal[False] | None = Field(None, description="A prompt is never cut.")
    shift: Literal[False] | None = Field(None, description="A context is never shifted.")


class OllamaChat(OllamaFields):
    """A conversation to go on with. Without messages: a question whether the model is loaded."""

    messages: Many[OllamaMessage] = Field(default_factory=list)
    tools: Few[ToolDefinition] | None = None


class OllamaGenerate(OllamaFields):
    """A text to answer, or with `raw` to continue."""

    refused: ClassVar[Mapping[str, str]] = {
        "images": _NO_IMAGES,
        "suffix": "these models only write on at the end; leave it out.",
        "template": "a request cannot bring a template; start a model that has it.",
        "context": "it is no longer given out; send the conversation to /api/chat.",
    }

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = Field(None, description="Without the chat template.")


class OllamaEmbed(Wire):
    """Texts to be made vectors."""

    model: Text
    input: str | Texts
    truncate: Literal[False] | None = Field(None, description="A text is never cut.")
    keep_alive: KeepAlive | None = None


class OllamaShow(Wire):
    """The model to be told about."""

    model: Text | None = None
    name: Text | None = Field(None, description="As `model`.")
    verbose: bool | None = None


class Details(Shape):
    """What a model is."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Tag(Shape):
    """One served name."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(Shape):
    """All of them."""

    models: list[Tag]


class RunningTag(Tag):
    """One that is loaded, as all are."""

    expires_at: str
    size_vram: int


class RunningTags(Shape):
    """All of them."""

    models: list[RunningTag]


class Version(Shape):
    """The version of Ollama's API."""

    version: str


class Shown(Shape):
    """What is known of a model."""

    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]


class ShownCall(Shape):
    """A tool that is called."""

    function: dict[str, Any]


class ShownMessage(Shape):
    """The reply."""

    role: Literal["assistant"]
    content: str
    thinking: str | None = None
    tool_calls: list[ShownCall] | None = None


class ChatLine(Shape):
    """The whole answer, or a line of it."""

    model: str
    created_at: str
    message: ShownMessage
    done: bool
    done_reason: str | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class GenerateLine(Shape):
    """The whole answer, or a line of it."""

    model: str
    created_at: str
    response: str
    thinking: str | None = None
    done: bool
    done_reason: str | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class Vectors(Shape):
    """A vector for each text."""

    model: str
    embeddings: list[list[float]]
    total_duration: Annotated[int, Field(description="Nanoseconds.")]
    load_duration: int
    prompt_eval_count: int
