"""Who comes in: tokens, sessions, a proxy's headers, and nobody else."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr

from tests.worker.fake_clock import FakeClock
from worker.console.identity import COOKIE, Caller, Identities
from worker.console.signing import Signer
from worker.errors import ConfigurationError
from worker.settings import ConsoleSettings

ADA = "ada-token-0123456789"
TOKENS = SecretStr(f"ada:reviewer:{ADA},victor:viewer:victor-token-0123456789")


def identities(clock: FakeClock | None = None, **settings: Any) -> Identities:
    return Identities(ConsoleSettings(**{"tokens": TOKENS, **settings}), Signer(b"key"), clock or FakeClock())


def caller(peer: str = "203.0.113.9", cookie: str = "", **headers: str) -> Caller:
    return Caller(peer, {name.replace("_", "-"): value for name, value in headers.items()}, {COOKIE: cookie})


def test_a_bearer_token() -> None:
    people = identities()
    ada = people.of(caller(authorization=f"Bearer {ADA}"))
    assert ada is not None and (ada.name, ada.may_decide) == ("ada", True)
    victor = people.of(caller(authorization="bearer victor-token-0123456789"))
    assert victor is not None and not victor.may_decide
    for wrong in ("Bearer nope", f"Basic {ADA}", ADA, "Bearer", ""):
        assert people.of(caller(authorization=wrong)) is None


def test_a_session_lasts_its_time_and_no_longer_than_its_token() -> None:
    clock = FakeClock()
    people = identities(clock, session_s=60)
    cookie = people.sign_in(ADA)
    assert cookie is not None
    assert ADA not in cookie
    ada = people.of(caller(cookie=cookie))
    assert ada is not None and ada.name == "ada"
    changed = identities(clock, tokens=SecretStr("ada:reviewer:another-token-456789"))
    assert changed.of(caller(cookie=cookie)) is None
    assert identities(clock, tokens=SecretStr("eve:viewer:another-token-456789")).of(caller(cookie=cookie)) is None
    clock.advance(61)
    assert people.of(caller(cookie=cookie)) is None
    assert people.sign_in("nobody's") is None


def test_a_demoted_holder_is_demoted_in_the_session_too() -> None:
    people = identities()
    cookie = people.sign_in(ADA)
    assert cookie is not None
    person = identities(tokens=SecretStr(f"ada:viewer:{ADA}")).of(caller(cookie=cookie))
    assert person is not None and not person.may_decide


def test_csrf_tokens_are_each_persons_own() -> None:
    people = identities()
    first, second = (people.of(caller(cookie=people.sign_in(ADA) or "")) for _ in range(2))
    assert first is not None and second is not None
    assert people.csrf_holds(first, people.csrf_token(first))
    assert not people.csrf_holds(first, people.csrf_token(second))
    assert not people.csrf_holds(first, "")
    assert not people.csrf_holds(first, "ü")


def test_a_proxy_is_believed_only_where_it_is_trusted() -> None:
    people = identities(auth="header", trusted_proxies=("10.1.0.0/16", "::1"))
    named = {"x_forwarded_user": "grace", "x_forwarded_groups": "staff, code-reviewers"}
    for peer, known in (("10.1.2.3", True), ("::1", True), ("10.2.0.1", False), ("127.0.0.1", False), ("unix", False)):
        found = people.of(caller(peer, **named))
        assert (found is not None) is known, peer
    grace = people.of(caller("::1", **named))
    assert grace is not None and grace.may_decide
    only_looking = people.of(caller("::1", x_forwarded_user="victor", x_forwarded_groups="staff"))
    assert only_looking is not None and not only_looking.may_decide
    for name in ("", "a\x00b", "x" * 200):
        assert people.of(caller("::1", x_forwarded_user=name)) is None


def test_viewers_may_be_named_by_group() -> None:
    people = identities(auth="header", viewer_groups=("lookers",))
    assert people.of(caller("::1", x_forwarded_user="eve", x_forwarded_groups="staff")) is None
    assert people.of(caller("::1", x_forwarded_user="eve", x_forwarded_groups="lookers")) is not None


def test_a_token_opens_nothing_where_the_proxy_decides() -> None:
    assert identities(auth="header").of(caller("::1", authorization=f"Bearer {ADA}")) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokens": None}, "WORKER_CONSOLE__TOKENS: required"),
        ({"tokens": SecretStr("ada:admin:0123456789012345")}, "entry 1"),
        ({"tokens": SecretStr(f"ada:viewer:{ADA},ada:viewer:{ADA}")}, "entry 2"),
        ({"tokens": SecretStr("ada:viewer:short")}, "entry 1"),
        ({"auth": "none", "host": "0.0.0.0"}, "WORKER_CONSOLE__AUTH: none"),
        ({"auth": "header", "trusted_proxies": ("proxy",)}, "WORKER_CONSOLE__TRUSTED_PROXIES"),
    ],
)
def test_settings_that_let_nobody_in_or_everybody(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as refused:
        identities(**settings)
    assert ADA not in str(refused.value)
