"""`qwenkit generate`: raw completion, for people as text and for programs as one JSON object."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenkit.cli import console, loading, options
from qwenkit.cli.constraint_options import ConstraintOptions
from qwenkit.cli.grouped import grouped
from qwenkit.cli.reply import Reply, show_reply
from qwenkit.cli.sampling_options import SamplingOptions, for_model
from qwenkit.errors import QwenkitError, UsageError
from qwenkit.types.sampling import SamplingParams

if TYPE_CHECKING:
    from qwenkit.api import LLM
    from qwenkit.types.completion import Completion
    from qwenkit.types.events import TokenLogprob
    from qwenkit.types.extension import Extension

MAX_TOKENS = 128  # a base model seldom ends by itself, and a context may be long

ModelAlias = Annotated[
    str | None,
    typer.Option(
        "--model-name-or-path",
        "--model_name_or_path",
        metavar="MODEL",
        help="Another way to give the model.",
    ),
]
Prompt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="The text to continue, exactly as given.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Read the text from a file (its last newline left out, as from standard input).",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        "--max-new-tokens",
        "--max_new_tokens",
        metavar="N",
        help=f"Longest output. [default: the model's own, else {MAX_TOKENS}]",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "-s",
        "--seed",
        metavar="N",
        help="The same seed gives the same text. [default: new at every call]",
    ),
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="With --json: each token's log-probability and the N likeliest."
    ),
]
PromptLogprobs = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="With --json: the same for each token of the prompt (null for the first).",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Write one JSON object: ids, text, usage, timing, seed.")
]
Echo = Annotated[bool, typer.Option("--echo", help="Put the prompt before the text.")]


@grouped
def command(
    model: options.ModelName = None,
    model_name_or_path: ModelAlias = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    logprobs: Logprobs = None,
    prompt_logprobs: PromptLogprobs = None,
    as_json: AsJson = False,
    echo: Echo = False,
    *,
    sampling: SamplingOptions,
    constrained: ConstraintOptions,
    loaded_as: options.ModelOptions,
) -> None:
    """Continue a text with a model, without a chat template and without control tokens in it.

    The text comes from --prompt, --prompt-file or standard input. The continuation goes to
    standard output as it is made, everything else to standard error. Control characters are made
    visible and a last newline is added; --json keeps the text exactly. A character that the token
    limit cuts in two is shown as U+FFFD.

    \b
    Examples:
      qwenkit generate --prompt "The capital of France is" --max-tokens 8 --greedy
      qwenkit generate --model_name_or_path Qwen/Qwen2-0.5B --max_new_tokens 32 \\
          --prompt $'Q: What is the biggest animal?\\nA:'
      qwenkit generate --prompt-file story.txt --json --logprobs 5
      qwenkit generate --prompt "Is water wet? " --choice yes --choice no
    """
    for option, asked in (("--logprobs", logprobs), ("--prompt-logprobs", prompt_logprobs)):
        if asked is not None and not as_json:
            raise UsageError(f"{option} has nowhere to go without --json; add it.")
    changes = sampling.changes(
        max_tokens=max_tokens, seed=seed, logprobs=logprobs, prompt_logprobs=prompt_logprobs
    )
    constraint = constrained.constraint()
    if constraint is not None:
        changes["constraint"] = constraint
    name = options.one_of({"MODEL": model, "--model_name_or_path": model_name_or_path})
    name = options.check_model_name(name, takes_prompt=True)
    text = _prompt(prompt, prompt_file)
    with loading.load_model(name, loaded_as) as llm:
        params = for_model(llm.record.sampling, changes, longest=MAX_TOKENS)
        (_write_json if as_json else _write_text)(llm, text, params, echo=echo)


def _prompt(text: str | None, file: Path | None) -> str:
    if text is not None and file is not None:
        raise UsageError("Got both --prompt and --prompt-file; give one.")
    if text is not None:
        text = options.check_text("--prompt", text)
    elif file is not None:
        text = options.read_text_file("--prompt-file", file).removesuffix("\n")
    elif console.is_typed():
        raise UsageError("Nothing to continue. Give --prompt, --prompt-file or pipe a text in.")
    else:
        text = options.read_standard_input().removesuffix("\n")
    if not text:
        raise UsageError("The prompt is empty; give at least one character.")
    return text


def _write_text(llm: LLM, prompt: str, sampling: SamplingParams, *, echo: bool) -> None:
    reply = Reply(prompt, llm.stream(prompt, sampling))
    show_reply(reply, label=prompt if echo else "")
    if reply.ended == "abort":
        raise typer.Exit(130)
    if reply.finish is not None and reply.ended == "error":
        raise QwenkitError(f"The completion failed: {reply.finish.error}")


def _write_json(llm: LLM, prompt: str, sampling: SamplingParams, *, echo: bool) -> None:
    done = llm.generate(prompt, sampling)
    told = as_dictionary(
        done,
        model=llm.record.name,
        prompt=prompt,
        echo=echo,
        token_bytes=llm.tokenizer.token_bytes,
    )
    console.say_json(told)
    if done.finish_reason == "error":
        raise QwenkitError(f"The completion failed: {done.error}")


def logprob_entries(
    logprobs: Sequence[TokenLogprob | None] | None, token_bytes: Callable[[int], bytes]
) -> list[dict[str, Any] | None] | None:
    """Tokens' log-probabilities as JSON-ready data, each with the token's text; None where there is
    none.

    A token that is no UTF-8 by itself, a part of a character, has its "bytes" too.
    """
    if logprobs is None:
        return None

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(token_id)
        text = data.decode(errors="replace")
        told = {"token_id": token_id, "text": text, "logprob": _finite(logprob)}
        return told if text.encode() == data else {**told, "bytes": list(data)}

    return [
        None
        if token is None
        else {
            **entry(token.token_id, token.logprob),
            "top": [entry(*pair) for pair in token.top],
        }
        for token in logprobs
    ]


def extension_entry(extension: Extension) -> dict[str, Any]:
    """How the request went beyond the trained length, as JSON-ready data."""
    return {
        "method": extension.method,
        "factor": extension.factor,
        "trained_tokens": extension.trained_tokens,
    }


def as_dictionary(
    done: Completion,
    *,
    model: str,
    prompt: str,
    echo: bool,
    token_bytes: Callable[[int], bytes],
) -> dict[str, Any]:
    """A completion as JSON-ready data; a number that is not finite becomes null."""
    return {
        "model": model,
        "prompt": prompt,
        "prompt_token_ids": list(done.prompt_token_ids),
        "token_ids": list(done.token_ids),
        "text": (prompt if echo else "") + done.text,
        "finish_reason": done.finish_reason,
        "matched_stop": done.matched_stop,
        "error": done.error,
        "usage": {
            "prompt_tokens": done.usage.prompt_tokens,
            "completion_tokens": done.usage.completion_tokens,
            "cached_tokens": done.usage.cached_tokens,
            "extension": extension_entry(done.usage.extension),
        },
        "logprobs": logprob_entries(done.logprobs, token_bytes),
        "prompt_logprobs": logprob_entries(done.prompt_logprobs, token_bytes),
        "seed": done.seed,
        "timing": {
            "first_token_s": _finite(done.timing.first_token_s),
            "total_s": _finite(done.timing.total_s),
            "prefill_tokens_per_second": _finite(done.timing.prefill_tokens_per_second),
            "decode_tokens_per_second": _finite(done.timing.decode_tokens_per_second),
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
