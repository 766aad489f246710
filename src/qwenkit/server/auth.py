"""Who asks: keys compared in constant time."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

from qwenkit.server.errors import ApiError
from qwenkit.server.settings import Access


class Doorman:
    """Knows the keys as digests, so that a comparison tells nothing by its time, not even how long
    a key is.
    """

    def __init__(self, access: Access) -> None:
        self._keys = [_digest(b"key", key.encode()) for key in access.api_keys]
        self._users = [
            _digest(b"user", f"{name}:{password}".encode()) for name, password in access.users
        ]
        ways = []
        if self._keys:
            ways.append("Bearer")
        if self._users:
            ways.append('Basic realm="qwenkit", charset="UTF-8"')
        self._challenge = ", ".join(ways)

    @property
    def has_many(self) -> bool:
        """True when more than one party may ask."""
        return len(self._keys) + len(self._users) > 1

    def identify(self, authorization: list[bytes]) -> str:
        """A short name for whose key it is, which tells nothing of the key; "" where none is asked
        for. Takes the values of the Authorization headers. Raises ApiError 401.
        """
        if not self._challenge:
            return ""
        if len(authorization) != 1:
            raise self._refused("a key is needed" if not authorization else "several keys came")
        scheme, _, given = authorization[0].strip().partition(b" ")
        scheme, given = scheme.lower(), given.strip()
        digest, known = b"", self._keys
        if scheme == b"bearer":
            digest = _digest(b"key", given)
        elif scheme == b"basic":
            digest, known = _digest(b"user", _decoded(given)), self._users
        # All are compared, so that the time does not say which one it was.
        matches = [hmac.compare_digest(digest, one) for one in known]
        if not any(matches):
            raise self._refused("the key is not one of this server's")
        return digest.hex()[:12]

    def _refused(self, reason: str) -> ApiError:
        ways = []
        if self._keys:
            ways.append("'Authorization: Bearer KEY'")
        if self._users:
            ways.append("'Authorization: Basic …' with name and password")
        return ApiError(
            401,
            f"Not allowed: {reason}. Send the header {' or '.join(ways)}.",
            code="invalid_api_key",
            headers={"www-authenticate": self._challenge},
        )


def _digest(kind: bytes, text: bytes) -> bytes:
    return hashlib.sha256(kind + b"\0" + text).digest()


def _decoded(given: bytes) -> bytes:
    try:
        return base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError):
        return b""
