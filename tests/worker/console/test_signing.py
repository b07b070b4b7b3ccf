"""Signed texts: one purpose, one content, until they expire."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from worker.console.signing import Signer
from worker.errors import ConfigurationError

SIGNER = Signer(b"key")


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none()).filter(lambda d: "expires_at" not in d))
def test_what_was_signed_comes_back(content: dict[str, object]) -> None:
    text = SIGNER.sign("image", content, expires_at=100)
    assert SIGNER.open("image", text, now=99) == {"expires_at": 100, **content}


def test_it_is_good_for_one_purpose_one_key_and_not_for_ever() -> None:
    text = SIGNER.sign("image", {"a": 1}, expires_at=100)
    assert SIGNER.open("session", text, now=99) is None
    assert SIGNER.open("image", text, now=100) is None
    assert Signer(b"other").open("image", text, now=99) is None


@given(st.text(), st.integers(min_value=0))
def test_changed_texts_are_refused(junk: str, place: int) -> None:
    text = SIGNER.sign("image", {"name": "ada"}, expires_at=100)
    place %= len(text)
    for changed in (junk, text[:place] + junk + text[place:], text[:place] + text[place + 1 :]):
        if changed != text:
            assert SIGNER.open("image", changed, now=1) is None


def test_a_short_key_is_refused_and_none_makes_one() -> None:
    with pytest.raises(ConfigurationError, match="WORKER_CONSOLE__SIGNING_KEY: must have 32"):
        Signer.of(SecretStr("short"))
    assert Signer.of(None).digest("a", "b") != Signer.of(None).digest("a", "b")
