"""Foreign hosts, origins and encodings are refused in words, not by an accident."""

from __future__ import annotations

import pytest

from qwenkit.server.errors import ApiError
from qwenkit.server.hosts import Origins
from qwenkit.server.settings import Access


def test_a_foreign_host_is_named() -> None:
    with pytest.raises(ApiError, match=r"not known as 'evil\.example'") as caught:
        Origins(Access()).check_host([b"evil.example"])
    assert caught.value.status == 421


def test_a_foreign_page_is_named() -> None:
    with pytest.raises(ApiError, match=r"Pages of 'https://evil\.example'") as caught:
        Origins(Access()).check_origin(b"https://evil.example", "127.0.0.1:8000")
    assert caught.value.status == 403
