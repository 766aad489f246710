"""`qwenkit tokenizer add-merges`: words become tokens, in the vocabulary and in a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenkit.checkpoint.hub import resolve
from qwenkit.cli import console, download
from qwenkit.errors import UsageError

if TYPE_CHECKING:
    from qwenkit.tokenizer import BytePairTokenizer
    from qwenkit.tokenizer.learn import Pair

_FIRST_GENERATION_START = 151851  # behind the 151,643 regular and 208 control tokens of Qwen


Input = Annotated[
    str,
    typer.Argument(
        metavar="INPUT", help="The vocabulary: qwen.tiktoken, tokenizer.json or a model."
    ),
]
Output = Annotated[
    Path, typer.Argument(metavar="OUTPUT", help="The .tiktoken file to write: new tokens only.")
]
WordFile = Annotated[
    Path, typer.Argument(metavar="WORDS", help="The words: each a line, a tab and its frequency.")
]
StartId = Annotated[
    int | None,
    typer.Option(
        "--start-id",
        "--start_id",
        metavar="N",
        help="Id of the first new token; -1 is the next after the regular tokens. [default: "
        f"{_FIRST_GENERATION_START} for a .tiktoken file, else the next free id]",
    ),
]
HfFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Write the whole vocabulary here too: vocab.json, merges.txt, tokenizer.json.",
    ),
]
Grown = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="A model of that vocabulary that gets the new tokens."),
]
Out = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where the model with them is written.")
]


def add_merges(
    input_path: Input,
    output_path: Output,
    vocab_path: WordFile,
    start_id: StartId = None,
    hf_folder: HfFolder = None,
    model: Grown = None,
    out: Out = None,
) -> None:
    """Make tokens of words: learn the merges that lead to them and write these as a file.

    Does what Qwen's add_merges.py does, file for file. Words that the tokenizer cuts before it
    merges, and words that are tokens already, are named and left out. A tokenizer takes the file as
    extra_vocab_file, an argument of AutoTokenizer.from_pretrained or a key of
    tokenizer_config.json.

    With --model, the embedding gets a row for each new token: the mean of the rows of the tokens
    that spelt it before. The model knows its new tokens only after fine-tuning.

    \b
    Examples:
      qwenkit tokenizer add-merges qwen.tiktoken qwen_extra.tiktoken qwen_extra_vocab.txt
      qwenkit tokenizer add-merges ./old extra.tiktoken words.txt --model ./old --out ./new
    """
    if (model is None) != (out is None):
        raise UsageError("--model and --out belong together: give both, or neither.")
    from qwenkit.checkpoint.vocabulary import open_tokenizer  # a second that --help does without
    from qwenkit.tokenizer.learn import with_ids
    from qwenkit.tokenizer.ranks import write_ranks

    source = _resolve(input_path)
    model_path = None if model is None else _resolve(model)
    models = [source] if model_path is None else [source, model_path]
    _check_output(output_path, [*models, vocab_path])
    for option, folder in (("--hf-folder", hf_folder), ("--out", out)):
        _check_folder(option, folder, models)
    tokenizer = open_tokenizer(source)
    if model_path is not None:
        _check_same(input_path, tokenizer, str(model), open_tokenizer(model_path))
    first_id = _first_id(input_path, tokenizer, start_id)
    count, merges = _learn(vocab_path, tokenizer)
    ranks = with_ids(merges, first_id)
    write_ranks(output_path, ranks)
    ids = f", ids {first_id} to {first_id + len(merges) - 1}" if merges else ""
    console.say(f"{output_path}: {len(merges)} merges for {count} words{ids}.")
    taken = [text for text, i in tokenizer.control_tokens.items() if i in ranks.values()]
    if taken:
        console.note(f"Ids of control tokens ({taken[0]} …) are among them: no tokenizer has both.")
    if hf_folder is not None:
        _write_hf_folder(hf_folder, tokenizer, ranks, str(output_path))
    if model_path is not None and out is not None:
        _extend_model(model_path, out, ranks)


def _check_output(path: Path, read: Sequence[Path]) -> None:
    """What is read must not be written over. Raises UsageError."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}"
        raise UsageError(f"OUTPUT: {str(path)!r}: {what}; give the .tiktoken file to write.")
    if path.exists() and not path.is_file():
        raise UsageError(f"OUTPUT: {str(path)!r} is no regular file; give a .tiktoken file.")
    for given in read if path.exists() else ():
        files = given.iterdir() if given.is_dir() else [given]
        if any(file.exists() and file.samefile(path) for file in files):
            part = "belongs to" if given.is_dir() else "is"
            raise UsageError(
                f"OUTPUT: {str(path)!r} {part} {str(given)!r}, which is read, and would be "
                "overwritten; give another file."
            )


def _check_folder(option: str, path: Path | None, read: Sequence[Path]) -> None:
    """A folder to write must not be a file or below one, nor hold what is read in the formats that
    are written. Raises UsageError.
    """
    if path is None:
        return
    taken = next((p for p in (path, *path.parents) if p.exists()), path)
    if taken.exists() and not taken.is_dir():
        raise UsageError(f"{option}: {str(taken)!r} is a file; give a folder to write.")
    for given in read if path.exists() else ():
        folder = given.parent if given.suffix == ".json" else given
        if folder.samefile(path):
            raise UsageError(
                f"{option}: {str(path)!r} holds {str(given)!r}, which is read, and would be "
                "overwritten; give another folder."
            )


def _learn(path: Path, tokenizer: BytePairTokenizer) -> tuple[int, list[Pair]]:
    """How many words there are to learn, and their merges."""
    from qwenkit.tokenizer.learn import learn_merges, read_words

    words = read_words(path, tokenizer)
    for remark in words.remarks:
        console.note(remark)
    with console.progress("Learning merges …") as show:
        return len(words.frequencies), learn_merges(words, tokenizer, progress=show)


def _resolve(name: str) -> Path:
    with download.bars() as bars:
        return resolve(name, progress=bars)


def _check_same(name: str, ours: BytePairTokenizer, model: str, theirs: BytePairTokenizer) -> None:
    if ours.reference.regular != theirs.reference.regular:
        raise UsageError(
            f"--model: {model!r} has another vocabulary than {name!r} (regular tokens: "
            f"{len(theirs.reference.regular):,} and {len(ours.reference.regular):,}); the merges "
            "would not fit. Give the model as INPUT too."
        )


def _first_id(name: str, tokenizer: BytePairTokenizer, given: int | None) -> int:
    """Never below a regular token's id: its merge would be overridden. Raises UsageError for one
    so high that no tokenizer takes the file.
    """
    from qwenkit.tokenizer.extend import LARGEST_GAP

    highest = len(tokenizer.vocabulary.tokens) + LARGEST_GAP
    if given is not None and given > highest:
        raise UsageError(
            f"--start-id: got {given}; a tokenizer of {tokenizer.vocab_size:,} ids takes new "
            f"tokens from at most {highest} on. Leave it out for the usual first id."
        )
    lowest = max(tokenizer.reference.regular.values()) + 1
    if given is None:
        given = _FIRST_GENERATION_START if name.endswith(".tiktoken") else tokenizer.vocab_size
    elif given in (0, -1):
        return lowest
    if given < lowest:
        console.note(f"--start_id {given} is taken by a regular token; {lowest} it is.")
    return max(given, lowest)


def _write_hf_folder(
    folder: Path, tokenizer: BytePairTokenizer, ranks: dict[bytes, int], source: str
) -> None:
    from qwenkit.tokenizer import BytePairTokenizer, write_folder
    from qwenkit.tokenizer.extend import extended

    grown = BytePairTokenizer(extended(tokenizer.vocabulary, ranks, source=source))
    with console.busy("Writing the vocabulary …"):
        files = write_folder(grown, folder)
    console.say(f"{folder}: {', '.join(file.name for file in files)}, {len(grown):,} ids.")


def _extend_model(source: Path, folder: Path, ranks: dict[bytes, int]) -> None:
    with console.progress("Loading the model …") as show:
        from qwenkit.convert import extend_folder  # torch takes seconds; something moves already

        done = extend_folder(source, folder, ranks, progress=show)
    rows = (
        f"{done.rows:,} rows as before, padding used"
        if done.rows == done.rows_before
        else f"{done.rows:,} rows instead of {done.rows_before:,}"
    )
    console.say(f"{folder}: the model with {done.tokenizer.vocab_size:,} ids, {rows}.")
