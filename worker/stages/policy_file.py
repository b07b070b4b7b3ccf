"""The policy file: TOML in, rules by tenant out, or every fault with its file, line and key. Format: docs/policy.md."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from worker.errors import ConfigurationError

ACTIONS = ("allow", "review", "block")
NEVER = "never"
CERTIFIED = "certified "
DEFAULT_TENANT = "default"
MAX_FILE_BYTES = 2**18
MAX_SHADOW_RULES = 20
MAX_PARSES = 300
"""Per file, to find the lines of its faults; later faults name the file alone."""

_RULE_KEYS = ("label", "review", "block", "on_undetermined", "uncertain")
_SHADOW_KEYS = ("tenants", "label", "review", "block")
_SHADOW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SYNTAX_LINE = re.compile(r"\(at line (\d+), column \d+\)$")

Path_ = tuple[str, ...]
Threshold = tuple[float | str, ...]
"""Alternatives, the first that the bundle has: a score, `never`, a name of the bundle's, or `certified NAME`."""
Band = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Rule:
    """One tenant's rule, or a shadow rule; None: not given here."""

    label: Threshold | None = None
    review: Threshold | None = None
    block: Threshold | None = None
    on_undetermined: str | None = None
    uncertain: Band | str | None = None
    tenants: tuple[str, ...] | None = None
    """Shadow rules: for whom; None: everyone."""


@dataclass(frozen=True)
class PolicyFile:
    """A policy as it was written, with what is needed to name the line of a fault that shows later."""

    name: str
    version: str
    tenants: Mapping[str, Rule]
    shadow: Mapping[str, Rule]
    source: str
    digest: str
    lines: Lines = field(repr=False)

    def fault(self, path: Path_, message: str) -> str:
        """`policy.toml:12: tenants.acme.review: message`."""
        line = self.lines.line_of(path)
        place = self.source if line is None else f"{self.source}:{line}"
        return f"{place}: {'.'.join(path)}: {message}" if path else f"{place}: {message}"


def read(path: Path) -> bytes:
    """The file's bytes.

    Raises:
        ConfigurationError: it cannot be read, or is too large to be a policy.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot read the policy: {error.strerror or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigurationError(f"{path}: larger than {MAX_FILE_BYTES} bytes; not a policy")
    return data


def built_in() -> PolicyFile:
    """The policy that is used without a file."""
    return parse(resources.files("worker").joinpath("policies/default.toml").read_bytes(), "built-in policy")


def digest_of(data: bytes) -> str:
    """SHA-256, hex: tells whether a file changed; its first 12 digits are the version of a policy that gives none."""
    return hashlib.sha256(data).hexdigest()


def parse(data: bytes, source: str) -> PolicyFile:
    """Read a policy.

    Args:
        data: the file's bytes.
        source: its name, for messages.

    Raises:
        ConfigurationError: every fault, one line each: `source:line: key: what it must be`.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{source}:{line}: not UTF-8") from error
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigurationError(_syntax_fault(source, text, error)) from error
    return _Checker(document, Lines(text), source, digest_of(data)).policy()


def _syntax_fault(source: str, text: str, error: Exception) -> str:
    message = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "nested too deeply"
    at = _SYNTAX_LINE.search(message)
    line = int(at[1]) if at else text.count("\n") + 1
    return f"{source}:{line}: not valid TOML: {_SYNTAX_LINE.sub('', message).strip()}"


class _Checker:
    """Walks a document once and collects every fault."""

    def __init__(self, document: dict[str, Any], lines: Lines, source: str, digest: str) -> None:
        self._document = document
        self._lines = lines
        self._source = source
        self._digest = digest
        self._faults: list[tuple[Path_, str]] = []

    def policy(self) -> PolicyFile:
        document = self._document
        self._unknown((), document, ("name", "version", "tenants", "shadow"))
        policy = PolicyFile(
            name=self._text("name") or self._source.removesuffix(".toml"),
            version=self._text("version") or self._digest[:12],
            tenants={name: self._rule(("tenants", name), rule, _RULE_KEYS) for name, rule in self._tables("tenants").items()},
            shadow={name: self._shadow(("shadow", name), rule) for name, rule in self._tables("shadow").items()},
            source=self._source,
            digest=self._digest,
            lines=self._lines,
        )
        if len(policy.shadow) > MAX_SHADOW_RULES:
            self._faults.append((("shadow",), f"more than {MAX_SHADOW_RULES} rules"))
        if self._faults:
            raise ConfigurationError([policy.fault(path, message) for path, message in self._faults])
        return policy

    def _text(self, key: str) -> str | None:
        value = self._document.get(key)
        if value is None or (isinstance(value, str) and 1 <= len(value) <= 100):
            return value
        self._faults.append(((key,), "must be a string of 1 to 100 characters"))
        return None

    def _tables(self, key: str) -> dict[str, dict[str, Any]]:
        value = self._document.get(key, {})
        if not isinstance(value, dict):
            self._faults.append(((key,), f"must be tables: [{key}.NAME]"))
            return {}
        for name, rule in value.items():
            if not isinstance(rule, dict):
                self._faults.append(((key, name), f"must be a table: [{key}.NAME]"))
        return {name: rule for name, rule in value.items() if isinstance(rule, dict)}

    def _shadow(self, path: Path_, table: dict[str, Any]) -> Rule:
        if not _SHADOW_NAME.fullmatch(path[-1]):
            self._faults.append((path, "a shadow rule's name has letters, digits, '_', '.', '-'; 64 at most"))
        if not any(key in table for key in ("label", "review", "block")):
            self._faults.append((path, "changes nothing: give it label, review or block"))
        return self._rule(path, table, _SHADOW_KEYS)

    def _rule(self, path: Path_, table: dict[str, Any], known: tuple[str, ...]) -> Rule:
        self._unknown(path, table, known)
        readers: dict[str, Callable[[Path_, Any], Any]] = {
            "label": self._threshold,
            "review": self._threshold,
            "block": self._threshold,
            "on_undetermined": self._action,
            "uncertain": self._band,
            "tenants": self._names,
        }
        return Rule(**{key: readers[key]((*path, key), table[key]) for key in known if key in table})

    def _threshold(self, path: Path_, value: Any) -> Threshold | None:
        alternatives = value if isinstance(value, list) else [value]
        for alternative in alternatives:
            is_score = isinstance(alternative, int | float) and not isinstance(alternative, bool) and 0 <= alternative <= 1
            if not is_score and not (isinstance(alternative, str) and alternative.strip()):
                self._faults.append(
                    (
                        path,
                        'must be a score from 0 to 1, the name of one of the bundle\'s thresholds, "never", or a list of these',
                    )
                )
                return None
        if not alternatives:
            self._faults.append((path, "must not be empty"))
            return None
        return tuple(text.strip() if isinstance(text, str) else float(text) for text in alternatives)

    def _action(self, path: Path_, value: Any) -> str | None:
        if value in ACTIONS:
            return str(value)
        self._faults.append((path, f"must be one of {', '.join(ACTIONS)}"))
        return None

    def _band(self, path: Path_, value: Any) -> Band | str | None:
        if value in ("bundle", NEVER):
            return str(value)
        scores = value if isinstance(value, list) else []
        if len(scores) == 2 and all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
            low, high = map(float, scores)
            if 0 <= low <= high <= 1:
                return low, high
        self._faults.append((path, 'must be "bundle", "never" or two scores [low, high] from 0 to 1'))
        return None

    def _names(self, path: Path_, value: Any) -> tuple[str, ...] | None:
        if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
            return tuple(value)
        self._faults.append((path, "must be a list of tenants"))
        return None

    def _unknown(self, path: Path_, table: dict[str, Any], known: tuple[str, ...]) -> None:
        for key in table:
            if key not in known:
                self._faults.append(((*path, key), f"unknown key; known are {', '.join(known)}"))


class Lines:
    """Where a key stands in a TOML text; the parser does not tell.

    A key first shows in the parse of the shortest beginning that holds it. What is cut within a value does not parse, so
    the key's line is the one after the longest beginning that parses without it.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._parses_left = MAX_PARSES

    @cached_property
    def _rows(self) -> list[str]:
        return [row + "\n" for row in self._text.split("\n")]

    def line_of(self, path: Path_) -> int | None:
        """Line of the key, counted from 1, or of the nearest table above that exists; None where there is none, or too far."""
        whole = tomllib.loads(self._text)
        while path and not _holds(whole, path):
            path = path[:-1]
        if not path:
            return None
        low, high = 0, len(self._rows)  # the first `low` lines parse without the key; it begins by line `high`
        while high - low > 1:
            middle = (low + high) // 2
            held, parsed = self._holds_within(middle, low, path)
            if held:
                high = parsed
            elif parsed > low:
                low = parsed
            else:  # nothing between `low` and `middle` parses: the value spans them
                held, parsed = self._holds_after(middle, high, path)
                if held:
                    high = low + 1
                else:
                    low = parsed
        return low + 1 if self._parses_left > 0 else None

    def _holds_within(self, end: int, start: int, path: Path_) -> tuple[bool, int]:
        """The longest beginning of at most `end` and more than `start` lines that parses, and whether it holds the key."""
        for count in range(end, start, -1):
            document = self._parse(count)
            if document is not None:
                return _holds(document, path), count
        return False, start

    def _holds_after(self, start: int, end: int, path: Path_) -> tuple[bool, int]:
        """The shortest beginning of more than `start` lines that parses, and whether it holds the key."""
        for count in range(start + 1, end + 1):
            document = self._parse(count)
            if document is not None:
                return _holds(document, path), count
        return True, end

    def _parse(self, count: int) -> dict[str, Any] | None:
        self._parses_left -= 1
        if self._parses_left <= 0:
            return {}
        try:
            return tomllib.loads("".join(self._rows[:count]))
        except tomllib.TOMLDecodeError:
            return None


def _holds(document: Any, path: Path_) -> bool:
    for key in path:
        if not isinstance(document, dict) or key not in document:
            return False
        document = document[key]
    return True
