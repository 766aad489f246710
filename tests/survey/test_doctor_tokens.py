"""The doctor on tokenizer, chat template and the defaults of generation."""

from __future__ import annotations

from pathlib import Path

import pytest
from planting import (
    GENERATION,
    Plant,
    assert_found,
    chat_that_ends_at_text,
    config,
    generation,
    kind_of,
    many_rows,
    remove,
    settings,
    two_vocabularies,
    write,
)

from tiny import TEMPLATE

# (kind of fault, how it is planted)
PLANTED: list[tuple[str, Plant]] = [
    ("broken-tokenizer", write("qwen.tiktoken", "AA== 5\n")),
    ("two-vocabularies", two_vocabularies),
    ("vocabulary-too-large", config(vocab_size=300)),
    ("vocabulary-too-small", many_rows),
    ("no-template", settings("chat_template")),
    ("broken-template", settings(chat_template="{% for m in messages %}")),
    ("no-template", settings(chat_template="")),
    ("no-template", settings(chat_template=" \n")),
    ("failing-template", settings(chat_template='{{ raise_exception("no") }}')),
    ("failing-template", settings(chat_template="{% for i in range(10**9) %}{% endfor %}")),
    ("template-drops-text", settings(chat_template="{# nothing #}")),
    ("no-generation-prompt", settings(chat_template=TEMPLATE.partition("{% if")[0])),
    ("template-token", settings(chat_template=TEMPLATE + "<|eot_id|>")),
    ("eos-mismatch", settings(eos_token="<|extra_0|>")),
    ("two-ends", generation(eos_token_id=[256])),
    ("special-id-kind", config(eos_token_id="<|im_end|>")),
    ("special-id-kind", generation(pad_token_id=[256, 1.5])),
    ("eos-misses-turn", chat_that_ends_at_text),
    ("special-id-range", config(pad_token_id=151643)),
    ("special-id-range", generation(eos_token_id=[258, 470])),  # a row of padding
    ("special-id-range", config(eos_token_id=[258, -5])),
    ("special-id-range", generation(eos_token_id=[258, -1])),
    ("ordinary-end", generation(eos_token_id=[258, 97])),
    ("unknown-special-token", settings(pad_token="<pad>")),
    ("added-bos", settings(add_bos_token=True)),
    ("bad-sampling", generation(top_p=1.5)),
    ("bad-sampling", generation(max_new_tokens="x")),
    ("bad-sampling", generation(do_sample=False, max_new_tokens=0)),
    ("bad-sampling", generation(repetition_penalty=-1)),
    ("bad-sampling", generation(do_sample="yes")),
    ("unknown-chat-format", generation(chat_format="zzz")),
    ("sampling-at-zero", generation(do_sample=True, temperature=0)),
    ("contradicting-lengths", generation(min_new_tokens=50, max_new_tokens=10)),
    ("no-generation-config", remove(GENERATION)),
]


@pytest.mark.parametrize(("kind", "plant"), PLANTED, ids=kind_of)
def test_what_is_planted_is_found(kind: str, plant: Plant, healthy: Path, tmp_path: Path) -> None:
    assert_found(kind, plant, healthy, tmp_path)
