"""Row 3: nothing that a .bin file brings along ever runs."""

from qwenkit.bench.reliability.tested import row_of_tests

ROW = row_of_tests(
    3,
    "a hostile pickle is refused and nothing in it runs",
    "tests/checkpoint/test_torch_bin.py",
)
