"""The `qwenkit` program: finds the command, and turns every qwenkit error into one line.

A command is the file `qwenkit/cli/<name>.py` with a typer function `command`, or a typer `app` for
a group of commands. Its one-line help stands in `COMMANDS`, so that `qwenkit --help` imports none
of them: torch alone would take seconds.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qwenkit import __version__
from qwenkit.cli import console
from qwenkit.errors import QwenkitError, RequestError, UsageError

COMMANDS = {
    "chat": "Talk with a model in the terminal, or ask it one question.",
    "generate": "Continue a text: raw completion, without a chat template.",
    "serve": "Answer over HTTP: the OpenAI API, and Ollama's.",
    "batch": "Answer a file of requests in OpenAI's batch format.",
    "web": "Open a chat page for any OpenAI-compatible server.",
    "info": "Say what a model is: sizes, context, template, licence.",
    "figures": "Say what was published about a model, with source and date.",
    "plan": "Say whether a model fits this machine, before it is downloaded.",
    "doctor": "Look at this machine, or for faults in a model's files.",
    "quantize": "Write a model in fewer bits, with a sheet of what that cost.",
    "compare": "Show what a model lost beside the one it was made of.",
    "export": "Write a model as a GGUF file, quantized or not, or as a folder.",
    "merge": "Put a LoRA adapter into a model's weights.",
    "pull": "Download a model, resuming and checking it.",
    "tokenizer": "Look at the tokens of a text, add words to a vocabulary.",
    "bench": "Measure speed and memory, beside other engines.",
}

_EXAMPLES = """\b
Examples:
  qwenkit chat                              talk with the embedded default model
  qwenkit chat --prompt "Why is it dark at night?"
  qwenkit generate --prompt "Once upon a time" --max-tokens 40
  qwenkit COMMAND --help                    what a command does, its defaults, an example
"""


class CommandGroup(TyperGroup):
    """The list of commands: a listed command is a name and a line until it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name in COMMANDS else listed, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except QwenkitError as error:
            if ctx.params.get("debug"):
                raise
            console.error(_for_people(error))
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from error
        except BrokenPipeError:
            raise  # `| head` closed the pipe: typer ends the program without a word
        except OSError as error:
            if ctx.params.get("debug"):
                raise
            console.error(str(error))
            raise typer.Exit(1) from error


def _for_people(error: QwenkitError) -> str:
    """The message; without the name of the field where that is the library's and says nothing."""
    internal = isinstance(error, RequestError) and error.field == "prompt_ids"
    return str(error).removeprefix("prompt_ids: ") if internal else str(error)


def load_command(name: str) -> Any:
    """Import the module of the command `name` and return its click command."""
    module = importlib.import_module(f"qwenkit.cli.{name}")
    group: typer.Typer | None = getattr(module, "app", None)
    if group is None:
        group = typer.Typer(add_completion=False, rich_markup_mode=None)
        group.command(name)(module.command)
    return typer.main.get_command(group)


app = typer.Typer(
    name="qwenkit",
    cls=CommandGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help needs no rich, which would double the start-up time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EXAMPLES,
)


def _list(name: str, summary: str) -> None:
    @app.command(name, help=summary)
    def listed() -> None:
        raise AssertionError(f"{name} is replaced by its module before it is called")


for _name, _summary in COMMANDS.items():
    _list(_name, _summary)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qwenkit {__version__}")
        raise typer.Exit


@app.callback()
def _prepare(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            envvar="QWENKIT_DEBUG",
            help="Log details to standard error, and show the traceback of an error.",
        ),
    ] = False,
) -> None:
    """qwenkit: the Qwen family of language models, from the terminal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(console.LogFormatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("qwenkit")
    logger.handlers = [handler]  # not appended: the program may be started twice in one process
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)


def main() -> None:
    """The entry point of the installed program."""
    console.tolerate_narrow_encodings()
    app(prog_name="qwenkit")


if __name__ == "__main__":
    main()
