"""Row 16: calls of tools in replies, whole and broken, whatever pieces they come in."""

from qwenkit.bench.reliability.tested import row_of_tests

ROW = row_of_tests(
    16,
    "a reply is told apart the same whatever pieces it comes in, in linear time",
    "tests/chat/test_replies.py",
    "tests/chat/test_reply_streams.py",
    "tests/chat/test_reply_round_trip.py",
    quick_marks="not oracle",  # five thousand of each dialect at every split take minutes
)
