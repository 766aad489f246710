"""Row 1: damaged safetensors files are refused, or read as they say."""

from qwenkit.bench.reliability.tested import row_of_tests

ROW = row_of_tests(
    1,
    "a damaged file is refused by file and field, or read as it says",
    "tests/checkpoint/test_mutations.py::test_damaged_files_are_refused_or_read_as_they_say"
    "[safetensors]",
    "tests/checkpoint/test_safetensors_files.py",
)
