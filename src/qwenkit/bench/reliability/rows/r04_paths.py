"""Row 4: names in files and of models lead nowhere outside their folder."""

from qwenkit.bench.reliability.tested import row_of_tests

ROW = row_of_tests(
    4,
    "nothing outside the folder is opened, whatever a file names",
    "tests/checkpoint/test_path_escape.py",
    "tests/checkpoint/test_names.py",
)
