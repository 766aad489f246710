"""Row 21: a number that is none ends its request by name, and only that one."""

from qwenkit.bench.reliability.tested import row_of_tests

ROW = row_of_tests(
    21,
    "NaN and overflow end their own request with a named error",
    "tests/test_load_finite.py",
    "tests/engine/test_engine_diagnose.py",
)
