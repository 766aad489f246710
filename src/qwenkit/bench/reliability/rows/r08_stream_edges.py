"""Row 8: what is streamed is the text of the ids, whatever the ids."""

from qwenkit.bench.reliability.tested import row_of_tests

ROW = row_of_tests(
    8,
    "joined deltas are the whole text, with no stray replacement character",
    "tests/engine/test_engine_text.py",
    "tests/tokenizer/test_tokenizer_stream.py",
)
