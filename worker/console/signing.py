"""Signed, short-lived texts: session cookies, links to images, CSRF tokens. HMAC-SHA256, one key, a purpose each."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
from typing import Any

from pydantic import SecretStr

from worker.errors import ConfigurationError
from worker.settings import environment_name

MIN_KEY_CHARS = 32


class Signer:
    """Signs small JSON objects for one purpose each, so that a link to an image is no session."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def of(cls, setting: SecretStr | None) -> Signer:
        """With the key that is set, or one that lives as long as this process.

        Raises:
            ConfigurationError: the key is short.
        """
        if setting is None:
            return cls(secrets.token_bytes(32))
        key = setting.get_secret_value()
        if len(key) < MIN_KEY_CHARS:
            raise ConfigurationError(
                f"{environment_name('console', 'signing_key')}: must have {MIN_KEY_CHARS} characters or more, it has {len(key)}"
            )
        return cls(key.encode())

    def sign(self, purpose: str, content: dict[str, Any], expires_at: float) -> str:
        """A text that `open` gives back as `content` until `expires_at` (POSIX seconds)."""
        body = _encode(json.dumps({"expires_at": round(expires_at), **content}, separators=(",", ":")).encode())
        return f"{body}.{self.digest(purpose, body)}"

    def open(self, purpose: str, text: str, now: float) -> dict[str, Any] | None:
        """What was signed; None where the text was not signed for this purpose, was changed or has expired."""
        body, _, signature = text.partition(".")
        if not hmac.compare_digest(self.digest(purpose, body).encode(), signature.encode("utf-8", "replace")):
            return None
        try:
            content = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        except (ValueError, binascii.Error):  # cannot be: we signed it
            return None
        return content if isinstance(content, dict) and content.get("expires_at", 0) > now else None

    def digest(self, purpose: str, text: str) -> str:
        """The signature alone, URL-safe."""
        return _encode(hmac.new(self._key, f"{purpose}\0{text}".encode("utf-8", "replace"), hashlib.sha256).digest())


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
