"""From scores to label and action: the rules of a policy file, bound to the thresholds of the model that scores."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from worker.errors import ConfigurationError
from worker.items import Decision, ModelRef, Scores
from worker.metrics import Metrics
from worker.settings import PolicySettings, environment_name
from worker.stages import policy_file
from worker.stages.policy_file import CERTIFIED, DEFAULT_TENANT, NEVER, PolicyFile, Rule, Threshold

log = structlog.get_logger(__name__)

UNREACHABLE = math.inf


class NamedThreshold(Protocol):
    """A threshold of the bundle (`engine.manifest.Threshold`)."""

    @property
    def threshold(self) -> float: ...
    @property
    def target_fpr(self) -> float: ...
    @property
    def fpr_upper(self) -> float: ...
    @property
    def reals(self) -> int: ...


class ScoreBand(Protocol):
    """A band of scores (`engine.manifest.Band`): low <= score < high."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


class Scale(Protocol):
    """The model that scores (`engine.detector.Detector`): what its serving head's scores mean."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def head(self) -> str: ...
    @property
    def thresholds(self) -> Mapping[str, NamedThreshold]: ...
    @property
    def abstain(self) -> ScoreBand | None: ...


@dataclass(frozen=True, slots=True)
class BoundRule:
    """A tenant's rule in numbers; infinity is never reached."""

    label: float
    review: float
    block: float
    on_undetermined: str
    uncertain: tuple[float, float]
    shadow: tuple[tuple[str, BoundRule], ...] = ()

    def action(self, score: float) -> str:
        """allow, review or block."""
        return "block" if score >= self.block else "review" if score >= self.review else "allow"

    def __str__(self) -> str:
        low, high = self.uncertain
        band = f", uncertain {low:g} to {high:g}" if high > low else ""
        label, review, block = (f"from {score:g}" if score <= 1 else "never" for score in (self.label, self.review, self.block))
        return f"ai_generated {label}, review {review}, block {block}, undetermined: {self.on_undetermined}{band}"


@dataclass(frozen=True, slots=True)
class BoundPolicy:
    """A policy whose every threshold is a number: for one model."""

    name: str
    version: str
    tenants: Mapping[str, BoundRule]

    def rule(self, tenant: str) -> BoundRule:
        """The tenant's, or the default one."""
        return self.tenants.get(tenant) or self.tenants[DEFAULT_TENANT]

    def decide(self, score: float, tenant: str) -> Decision:
        """Label and action of a calibrated score; one that is no probability is undetermined, never authentic."""
        if not 0 <= score <= 1:
            return self.undetermined(tenant)
        rule = self.rule(tenant)
        return Decision(
            label="ai_generated" if score >= rule.label else "authentic",
            action=rule.action(score),
            uncertain=rule.uncertain[0] <= score < rule.uncertain[1],
            policy=self.name,
            version=self.version,
            shadow={name: shadow.action(score) for name, shadow in rule.shadow} or None,
        )

    def undetermined(self, tenant: str) -> Decision:
        """Of an event without a score."""
        return Decision("undetermined", self.rule(tenant).on_undetermined, False, self.name, self.version)


def bind(policy: PolicyFile, scale: Scale) -> BoundPolicy:
    """Put the model's numbers for names.

    Raises:
        ConfigurationError: a name the model lacks, or thresholds out of order; one line each, with the line at fault.
    """
    faults: list[str] = []
    base = policy_file.built_in().tenants[DEFAULT_TENANT]
    default = _merged(base, policy.tenants.get(DEFAULT_TENANT, Rule()))
    tenants = {}
    in_shadow = [tenant for change in policy.shadow.values() for tenant in change.tenants or ()]
    for tenant in dict.fromkeys([DEFAULT_TENANT, *policy.tenants, *in_shadow]):
        rule = _merged(default, policy.tenants.get(tenant, Rule()))
        binder = _Binder(policy, scale, ("tenants", tenant), faults)
        shadow = []
        for name, change in policy.shadow.items():
            if change.tenants is None or tenant in change.tenants:
                shadow.append((name, _Binder(policy, scale, ("shadow", name), faults).bound(_merged(rule, change), ())))
        tenants[tenant] = binder.bound(rule, tuple(shadow))
    if faults:
        raise ConfigurationError(list(dict.fromkeys(faults)))
    return BoundPolicy(policy.name, policy.version, tenants)


class _Binder:
    """Binds one rule; faults go to the caller's list, at the rule's own lines."""

    def __init__(self, policy: PolicyFile, scale: Scale, path: tuple[str, ...], faults: list[str]) -> None:
        self._policy = policy
        self._scale = scale
        self._path = path
        self._faults = faults

    def bound(self, rule: Rule, shadow: tuple[tuple[str, BoundRule], ...]) -> BoundRule:
        label, review, block = (self._number(key, getattr(rule, key)) for key in ("label", "review", "block"))
        if block < review < UNREACHABLE:  # `never` reviewed and yet blocked is a policy
            self._fault("block" if "block" in self._own else "review", f"review ({review:g}) must not be above block ({block:g})")
        return BoundRule(label, review, block, rule.on_undetermined or "review", self._band(rule), shadow)

    def _number(self, key: str, threshold: Threshold | None) -> float:
        problem = "missing"
        for alternative in threshold or ():
            if isinstance(alternative, float):
                return alternative
            if alternative == NEVER:
                return UNREACHABLE
            name = alternative.removeprefix(CERTIFIED).strip()
            found = self._scale.thresholds.get(name)
            if found is None:
                known = ", ".join(sorted(self._scale.thresholds)) or "none"
                problem = f"{self._model} has no threshold {name!r}; it has: {known}"
            elif alternative.startswith(CERTIFIED) and found.fpr_upper > found.target_fpr:
                problem = (
                    f"{self._model} does not certify {name!r}: its false-positive rate may be up to {found.fpr_upper:.3g}"
                    f" (95% confidence, {found.reals} real images)"
                )
            else:
                return found.threshold
        self._fault(key, problem)
        return math.nan

    def _band(self, rule: Rule) -> tuple[float, float]:
        if isinstance(rule.uncertain, tuple):
            return rule.uncertain
        band = self._scale.abstain
        return (band.low, band.high) if rule.uncertain == "bundle" and band is not None else (0.0, 0.0)

    @property
    def _own(self) -> set[str]:
        """Keys that this rule gives itself; the others come from the default rule."""
        rules = self._policy.tenants if self._path[0] == "tenants" else self._policy.shadow
        rule = rules.get(self._path[1], Rule())
        return {key for key in ("label", "review", "block") if getattr(rule, key) is not None}

    @property
    def _model(self) -> str:
        return f"model {self._scale.name} {self._scale.version}, head {self._scale.head}"

    def _fault(self, key: str, message: str) -> None:
        path = self._path if key in self._own else (self._path[0], DEFAULT_TENANT)
        self._faults.append(self._policy.fault((*path, key), message))


def _merged(base: Rule, change: Rule) -> Rule:
    given = {name: getattr(change, name) for name in Rule.__slots__}
    return Rule(**{name: getattr(base, name) if value is None else value for name, value in given.items()})


class PolicyKeeper:
    """The policy in service: decides, and takes over a changed file or another model without a pause.

    `decide` and `undetermined` may be called from any thread; they read one snapshot. `bind` and `reload_if_changed` exclude
    each other.
    """

    def __init__(self, settings: PolicySettings, metrics: Metrics) -> None:
        """
        Raises:
            ConfigurationError: the file cannot be read or is wrong; each fault with its line.
        """
        self._path: Path | None = settings.file
        self._metrics = metrics
        self._lock = threading.Lock()
        self._scales: dict[str, Scale] = {}
        self._bound: dict[str, BoundPolicy] = {}
        self._current: BoundPolicy | None = None
        self._refused_digest: str | None = None
        self._policy = self._read()

    @property
    def policy(self) -> PolicyFile:
        """As it was written."""
        return self._policy

    @property
    def current(self) -> BoundPolicy:
        """Bound to the model that was bound last."""
        if self._current is None:
            raise RuntimeError("PolicyKeeper.bind comes first")
        return self._current

    def bind(self, scale: Scale) -> None:
        """Another model scores from now on; what the one before still has in flight is decided by its own numbers.

        Raises:
            ConfigurationError: the policy names a threshold this model lacks; nothing has changed then.
        """
        with self._lock:
            bound = bind(self._policy, scale)
            before = list(self._scales.items())[-1:]
            self._scales = {**dict(before), scale.version: scale}
            self._take(self._policy, {**self._bound, scale.version: bound}, bound)

    def decide(self, scores: Scores, tenant: str, model: ModelRef) -> Decision:
        """Label and action for the serving head's score."""
        policy = self._bound.get(model.version) or self.current
        decision = policy.decide(scores.heads[model.head], tenant)
        for rule, action in (decision.shadow or {}).items():
            self._metrics.shadow_decisions.labels(rule, action, decision.action).inc()
        return decision

    def undetermined(self, tenant: str) -> Decision:
        """Of an event without a score."""
        return self.current.undetermined(tenant)

    def reload_if_changed(self) -> bool:
        """Read the file again where its content changed; the old policy stays if the new one is wrong. True: a new one serves."""
        if self._path is None:
            return False
        with self._lock:
            digest = ""
            try:
                data = policy_file.read(self._path)
                digest = policy_file.digest_of(data)
                if digest in (self._policy.digest, self._refused_digest):
                    if digest == self._policy.digest:
                        self._refused_digest = None
                    return False
                policy = policy_file.parse(data, self._path.name)
                bound = {version: bind(policy, scale) for version, scale in self._scales.items()}
            except ConfigurationError as error:
                self._refuse(error, digest)
                return False
            self._refused_digest = None
            self._take(policy, bound, list(bound.values())[-1] if bound else None)
        self._metrics.policy_reloads.labels("ok").inc()
        log.info("policy.reloaded", name=policy.name, version=policy.version)
        return True

    def _take(self, policy: PolicyFile, bound: dict[str, BoundPolicy], current: BoundPolicy | None) -> None:
        self._policy = policy
        self._bound = {version: bound[version] for version in self._scales}
        self._current = current
        self._metrics.set_policy(policy.name, policy.version)

    def _refuse(self, error: ConfigurationError, digest: str) -> None:
        if digest == self._refused_digest:
            return  # said before; a file that is missing for long is said once, too
        self._refused_digest = digest
        self._metrics.policy_reloads.labels("failed").inc()
        log.error("policy.refused", problems=error.problems, kept=f"{self._policy.name} {self._policy.version}")

    def _read(self) -> PolicyFile:
        if self._path is None:
            return policy_file.built_in()
        try:
            return policy_file.parse(policy_file.read(self._path), self._path.name)
        except ConfigurationError as error:
            name = environment_name("policy", "file")
            raise ConfigurationError([f"{name}: {problem}" for problem in error.problems]) from error
