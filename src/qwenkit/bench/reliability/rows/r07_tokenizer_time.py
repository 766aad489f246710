"""Row 7: a million characters of anything are tokenized in near linear time."""

from qwenkit.bench.reliability.tested import row_of_tests

ROW = row_of_tests(
    7,
    "any text is tokenized in near linear time and never raises",
    "tests/tokenizer/test_tokenizer_fast.py::test_a_million_characters_of_anything",
    "tests/tokenizer/test_tokenizer_fast.py::test_long_runs_equal_the_reference",
)
