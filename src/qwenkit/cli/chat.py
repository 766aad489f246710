"""`qwenkit chat`: a conversation in the terminal, or one question and its answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qwenkit.cli import console, loading, options
from qwenkit.cli.chat_session import ChatSession
from qwenkit.cli.chat_terminal import converse, welcome
from qwenkit.cli.grouped import grouped
from qwenkit.cli.reply import show_reply
from qwenkit.cli.sampling_options import SamplingOptions, for_model
from qwenkit.errors import QwenkitError, UsageError

SEED = 1234  # as in the first generation's demo: the same conversation gives the same replies
MAX_TOKENS = 2048  # ends a small model's endless loop; `:continue` goes on with a longer answer

Question = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="One question, as --prompt.")
]
CheckpointPath = Annotated[
    str | None,
    typer.Option("-c", "--checkpoint-path", metavar="MODEL", help="Another way to give the model."),
]
Prompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Answer this and exit, without reading standard input."),
]
System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help='System prompt; "" for none. [default: the model\'s own]'),
]
SystemFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Read the system prompt from a file.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option(metavar="N", help=f"Longest reply. [default: the model's own, else {MAX_TOKENS}]"),
]
Seed = Annotated[
    int, typer.Option("-s", "--seed", metavar="N", help="The same seed gives the same reply.")
]
CpuOnly = Annotated[
    bool, typer.Option("--cpu-only", help="Compute on the CPU, as without --device.")
]


@grouped
def command(
    model: options.ModelName = None,
    question: Question = None,
    checkpoint_path: CheckpointPath = None,
    prompt: Prompt = None,
    system: System = None,
    system_file: SystemFile = None,
    max_tokens: MaxTokens = None,
    seed: Seed = SEED,
    cpu_only: CpuOnly = False,
    *,
    sampling: SamplingOptions,
    loaded_as: options.ModelOptions,
) -> None:
    """Talk with a model. Without MODEL the embedded SmolLM2-135M-Instruct speaks (not a Qwen).

    With a question (PROMPT, --prompt or standard input) it answers once and exits: the reply goes
    to standard output, everything else to standard error. In a conversation :help lists the
    commands, Ctrl-C stops a reply, Alt-Enter begins a new line, Ctrl-D leaves.

    \b
    Examples:
      qwenkit chat
      qwenkit chat Qwen/Qwen2-0.5B-Instruct --system "Answer in one sentence."
      qwenkit chat --prompt "What is the capital of France?" --greedy
      cat letter.txt | qwenkit chat --system "Summarise the letter."
    """
    if cpu_only and (loaded_as.device, loaded_as.device_map) != ("cpu", None):
        raise UsageError("Got --cpu-only and another device; drop one.")
    changes = sampling.changes(max_tokens=max_tokens, seed=seed)
    name = options.one_of({"MODEL": model, "--checkpoint-path": checkpoint_path})
    name = options.check_model_name(name, takes_prompt=True)
    system = _system_prompt(system, system_file)
    asked = _question(options.one_of({"PROMPT": question, "--prompt": prompt}))
    with loading.load_model(name, loaded_as) as llm:
        params = for_model(llm.record.sampling, changes, longest=MAX_TOKENS)
        session = ChatSession(llm, sampling=params, system=system)
        if asked is None:
            _converse(session, name)
        else:
            _answer_once(session, asked)


def _system_prompt(text: str | None, file: Path | None) -> str | None:
    if text is not None and file is not None:
        raise UsageError("Got both --system and --system-file; give one.")
    if file is not None:
        return options.read_text_file("--system-file", file)
    return None if text is None else options.check_text("--system", text)


def _question(given: str | None) -> str | None:
    """The one question to answer, or None for a conversation. Raises UsageError."""
    if given is not None:
        if not given.strip():
            raise UsageError("The prompt is empty. Leave it out to open a conversation.")
        return options.check_text("The prompt", given)
    if not console.is_typed():
        return options.read_standard_input().removesuffix("\n")
    if not sys.stdout.isatty():
        raise UsageError(
            "A conversation needs a terminal to write to. Give the question by --prompt."
        )
    return None


def _converse(session: ChatSession, model_name: str) -> None:
    from qwenkit.cli.chat_input import PromptReader  # slow, and for people only

    model = session.model
    console.say(welcome(model.record, model_name, model.context_tokens))
    converse(session, PromptReader())


def _answer_once(session: ChatSession, question: str) -> None:
    reply = session.ask(question)
    show_reply(reply)
    if reply.ended == "abort":
        raise typer.Exit(130)  # stopped by Ctrl-C, as shells report it
    if reply.ended == "error":
        raise QwenkitError(session.keep(reply) or "The reply failed.")
