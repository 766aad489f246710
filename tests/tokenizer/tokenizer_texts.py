"""Texts that are hard to tokenize, for property tests."""

from __future__ import annotations

import random

from hypothesis import strategies as st

# Unassigned code points are left out: what they are depends on the age of Unicode tables, which
# differs between this Python, regex and tiktoken.
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"))
FRAGMENTS = (
    *("a", "Zebra", "hello", "don't", "WE'LL", "'s", "'ſ", "'", "x" * 40, "Ünïcode", "ß", "ﬁ"),
    *("1", "2024", "½", "２", "٣", "3.14", "x2y"),
    *(" ", "  ", "\t", "\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "\x00"),
    *(".", "!?", "...", "#include", "();", "，。", "——", "_", "…", "€", "\u200d", "\ufeff"),
    *("你好", "我是一只猫", "日本語", "안녕", "Привет", "עברית", "العربية", "ไทย", "नमस्ते", "កាន់"),
    *(
        "e\u0301",
        "\u0301\u0316",
        "ϒ\u0301",
        "\u212b",
        "가",
        "Ｋ",
        "😀",
        "👨‍👩‍👧",
        "🇨🇳",
        "\U000e0041",
    ),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "<|im_", "|>", "<", "\u0338"),
)
TEXTS = st.one_of(
    st.text(CHARACTERS, max_size=40),
    st.lists(st.sampled_from(FRAGMENTS), max_size=24).map("".join),
    st.lists(
        st.one_of(st.sampled_from(FRAGMENTS), st.text(CHARACTERS, max_size=3)), max_size=12
    ).map("".join),
)


def corpus(count: int, *, seed: int = 0) -> list[str]:
    """`count` texts made of fragments and random characters, the same for the same seed."""
    rng = random.Random(seed)
    blocks = [(0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x400, 0x530), (0xE00, 0xE5C)]
    blocks += [(0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0x1F300, 0x1F650)]

    def part() -> str:
        if rng.random() < 0.6:
            return rng.choice(FRAGMENTS)
        low, high = rng.choice(blocks)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 5)))

    return ["".join(part() for _ in range(rng.randrange(1, 30))) for _ in range(count)]
