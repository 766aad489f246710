"""Row 6: no text of a message becomes a turn of its own."""

from qwenkit.bench.reliability.tested import row_of_tests

ROW = row_of_tests(
    6,
    "control ids in a prompt are those of its turns, whatever is said in them",
    "tests/chat/test_chat_forgery.py",
)
