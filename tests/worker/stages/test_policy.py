"""Policies: what they decide, where their faults are, and that a wrong new one never takes the old one's place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from engine.manifest import Band, Threshold
from worker.errors import ConfigurationError
from worker.items import Decision, ModelRef, Scores
from worker.metrics import Metrics
from worker.settings import PolicySettings
from worker.stages.policy import BoundPolicy, PolicyKeeper, bind
from worker.stages.policy_file import Lines, built_in, parse


def threshold(score: float, target: float, upper: float, reals: int = 5000) -> Threshold:
    return Threshold(target_fpr=target, threshold=score, fpr=0.0, fpr_upper=upper, reals=reals)


@dataclass(frozen=True)
class FakeScale:
    name: str = "code-tiny"
    version: str = "1"
    head: str = "linear"
    thresholds: Mapping[str, Threshold] = field(
        default_factory=lambda: {"fpr_0.01": threshold(0.8, 0.01, 0.009), "fpr_0.001": threshold(0.95, 0.001, 0.0009)}
    )
    abstain: Band | None = field(default_factory=lambda: Band(low=0.4, high=0.6))


SCALE = FakeScale()
MODEL = ModelRef("code-tiny", "1", "linear", "torch", "cpu")


def policy(text: str, scale: FakeScale = SCALE) -> BoundPolicy:
    return bind(parse(text.encode(), "policy.toml"), scale)


def scored(score: float) -> Scores:
    return Scores(heads={"linear": score, "knn": 0.0, "ocsvm": 0.0}, crops=(score,))


def faults(text: str | bytes, scale: FakeScale = SCALE) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        bind(parse(text if isinstance(text, bytes) else text.encode(), "policy.toml"), scale)
    return caught.value.problems


def test_the_built_in_policy_reviews_at_one_percent_and_blocks_at_a_certified_tenth() -> None:
    bound = bind(built_in(), SCALE)
    assert [bound.decide(score, "any").action for score in (0.0, 0.79, 0.8, 0.94, 0.95, 1.0)] == [
        "allow", "allow", "review", "review", "block", "block",
    ]  # fmt: skip
    assert [bound.decide(score, "any").label for score in (0.0, 0.499, 0.5, 1.0)] == [
        "authentic", "authentic", "ai_generated", "ai_generated",
    ]  # fmt: skip
    assert [bound.decide(score, "any").uncertain for score in (0.39, 0.4, 0.59, 0.6)] == [False, True, True, False]
    assert bound.undetermined("any") == Decision("undetermined", "review", False, "default", bound.version)
    assert len(bound.version) == 12


def test_the_built_in_policy_never_blocks_on_too_few_reals() -> None:
    few = replace(SCALE, thresholds={**SCALE.thresholds, "fpr_0.001": threshold(0.95, 0.001, 0.004, reals=700)})
    assert bind(built_in(), few).decide(1.0, "any").action == "review"


def test_the_built_in_policy_serves_a_bundle_without_thresholds() -> None:
    bound = bind(built_in(), replace(SCALE, thresholds={}, abstain=None))
    assert [bound.decide(score, "any").action for score in (0.49, 0.5, 1.0)] == ["allow", "review", "review"]
    assert not bound.decide(0.5, "any").uncertain


def test_tenants_inherit_from_the_default_and_it_from_the_built_in() -> None:
    bound = policy(
        """
        name = "house"
        version = "7"
        [tenants.default]
        review = 0.6
        [tenants.strict]
        block = 0.7
        on_undetermined = "block"
        uncertain = [0.1, 0.2]
        [tenants."with space.and dot"]
        review = "never"
        block = "never"
        label = 0.9
        uncertain = "never"
        """
    )
    assert bound.decide(0.65, "unheard-of") == Decision("ai_generated", "review", False, "house", "7")
    assert bound.decide(0.96, "unheard-of").action == "block"
    assert [bound.decide(score, "strict").action for score in (0.59, 0.6, 0.7)] == ["allow", "review", "block"]
    assert bound.decide(0.15, "strict").uncertain
    assert bound.undetermined("strict").action == "block"
    assert bound.decide(1.0, "with space.and dot") == Decision("ai_generated", "allow", False, "house", "7")
    assert bound.decide(0.5, "with space.and dot").label == "authentic"
    assert not bound.decide(0.5, "with space.and dot").uncertain


def test_blocking_without_reviewing_is_a_policy() -> None:
    bound = policy("[tenants.default]\nreview = 'never'\nblock = 0.9")
    assert [bound.decide(score, "t").action for score in (0.89, 0.9)] == ["allow", "block"]


def test_an_empty_file_is_the_built_in_policy_under_its_own_name() -> None:
    bound = policy("")
    assert bound.name == "policy"
    assert bound.tenants == bind(built_in(), SCALE).tenants


def test_shadow_rules_report_and_change_nothing() -> None:
    bound = policy(
        """
        [tenants.acme]
        review = 0.5
        block = 0.9
        [shadow.strict]
        tenants = ["acme", "no-table-of-its-own"]
        review = 0.4
        block = 0.6
        [shadow.lax]
        review = 0.7
        """
    )
    assert bound.decide(0.65, "acme").action == "review"
    assert bound.decide(0.65, "acme").shadow == {"strict": "block", "lax": "allow"}
    assert bound.decide(0.65, "no-table-of-its-own").shadow == {"strict": "block", "lax": "allow"}
    assert bound.decide(0.65, "no-table-of-its-own").action == "allow"
    assert bound.decide(0.85, "other").shadow == {"lax": "review"}
    assert bound.decide(0.1, "other").shadow == {"lax": "allow"}
    assert policy("").decide(0.65, "acme").shadow is None
    assert bound.undetermined("acme").shadow is None


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_what_is_no_probability_is_undetermined(score: float) -> None:
    decision = bind(built_in(), SCALE).decide(score, "any")
    assert (decision.label == "undetermined") == (not 0 <= score <= 1)
    if decision.label == "undetermined":
        assert decision.action == "review"


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_actions_grow_with_the_score(first: float, second: float, lower: float, upper: float) -> None:
    review, block = sorted((first, second))
    low, high = sorted((lower, upper))
    bound = policy(f"[tenants.default]\nreview = {review!r}\nblock = {block!r}\nlabel = {lower!r}")
    order = ["allow", "review", "block"]
    assert order.index(bound.decide(low, "t").action) <= order.index(bound.decide(high, "t").action)
    assert bound.decide(review, "t").action != "allow"
    assert bound.decide(block, "t").action == "block"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name = \n", "policy.toml:1: not valid TOML"),
        ("[tenants.a]\nreview = 0.5\nreview = 0.6\n", "policy.toml:3: not valid TOML"),
        ("x = [" * 3000, "policy.toml:1: not valid TOML"),
        ("[tenants.a]\n\n[tenants.a", "policy.toml:3: not valid TOML"),
        (b"# fine\n# \xff\n", "policy.toml:2: not UTF-8"),
        ("# c\nnmae = 'x'\n", "policy.toml:2: nmae: unknown key; known are name, version, tenants, shadow"),
        ("name = 5\n", "policy.toml:1: name: must be a string"),
        ("version = ''\n", "policy.toml:1: version: must be a string"),
        ("tenants = 5\n", "policy.toml:1: tenants: must be tables"),
        ("\ntenants.a = 5\n", "policy.toml:2: tenants.a: must be a table"),
        ("[tenants.a]\nreviw = 0.5\n", "policy.toml:2: tenants.a.reviw: unknown key; known are label, review"),
        ("[tenants.a]\n# c\n\nreview = 1.5\n", "policy.toml:4: tenants.a.review: must be a score from 0 to 1"),
        ("[tenants.a]\nreview = true\n", "policy.toml:2: tenants.a.review: must be a score"),
        ("[tenants.a]\nreview = nan\n", "policy.toml:2: tenants.a.review: must be a score"),
        ("[tenants.a]\nreview = []\n", "policy.toml:2: tenants.a.review: must not be empty"),
        ("[tenants.a]\nreview = [\n  0.5,\n  -1,\n]\nblock = 1\n", "policy.toml:2: tenants.a.review: must be a score"),
        (
            "[tenants.a]\non_undetermined = 'deny'\n",
            "policy.toml:2: tenants.a.on_undetermined: must be one of allow, review, block",
        ),
        ("[tenants.a]\nuncertain = [0.6, 0.4]\n", "policy.toml:2: tenants.a.uncertain: must be"),
        ("[tenants.a]\nuncertain = [0.6]\n", "policy.toml:2: tenants.a.uncertain: must be"),
        (
            "[tenants.a]\nreview = 0.9\nblock = 0.8\n",
            "policy.toml:3: tenants.a.block: review (0.9) must not be above block (0.8)",
        ),
        ("[tenants.a]\nreview = 0.99\n", "policy.toml:2: tenants.a.review: review (0.99) must not be above block (0.95)"),
        ("[tenants.a]\nblock = 0.7\n", "policy.toml:2: tenants.a.block: review (0.8) must not be above block (0.7)"),
        (
            "[tenants.a]\nreview = 'fpr_0.05'\n",
            "policy.toml:2: tenants.a.review: model code-tiny 1, head linear has no threshold 'fpr_0.05'; it has: fpr_0.001, fpr",
        ),
        ("[shadow.x]\ntenants = ['a']\n", "policy.toml:1: shadow.x: changes nothing"),
        ("[shadow.x]\nreview = 0.1\ntenants = 'a'\n", "policy.toml:3: shadow.x.tenants: must be a list"),
        ("[shadow.x]\nreview = 0.1\non_undetermined = 'allow'\n", "policy.toml:3: shadow.x.on_undetermined: unknown key"),
        ("[shadow.'a b']\nreview = 0.1\n", "policy.toml:1: shadow.a b: a shadow rule's name"),
        ("[shadow.x]\nreview = 0.99\n", "policy.toml:2: shadow.x.review: review (0.99) must not be above"),
        ("\n".join(f"[shadow.x{n}]\nreview = 0.1" for n in range(21)), "policy.toml:1: shadow: more than 20 rules"),
    ],
)
def test_a_fault_has_its_file_line_and_key(text: str | bytes, expected: str) -> None:
    assert any(fault.startswith(expected) for fault in faults(text)), faults(text)


def test_uncertified_thresholds_are_explained() -> None:
    few = replace(SCALE, thresholds={"fpr_0.001": threshold(0.95, 0.001, 0.004, reals=700)})
    (fault,) = faults("[tenants.default]\nreview = 0.1\nblock = 'certified fpr_0.001'", few)
    assert fault.startswith("policy.toml:3: tenants.default.block: ")
    assert "0.004" in fault
    assert "700" in fault


def test_every_fault_is_told_at_once() -> None:
    assert len(faults("nmae = 'x'\n[tenants.a]\nreview = 2\nblock = 'x'\non_undetermined = 1\n")) == 3


def test_a_fault_of_the_default_is_told_once() -> None:
    assert len(faults("[tenants.default]\nreview = 'nope'\n[tenants.a]\n[tenants.b]\n")) == 1


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[tuple[str, ...], int]]:
    """TOML with comments, blanks and values of several lines, and the line of each key."""
    rows: list[str] = []
    lines: dict[tuple[str, ...], int] = {}
    for table in range(draw(st.integers(1, 5))):
        rows += draw(st.lists(st.sampled_from(["", "# comment", '# "quotes = 1']), max_size=3))
        rows.append(f"[t.n{table}]")
        lines["t", f"n{table}"] = len(rows)
        for key in range(draw(st.integers(0, 4))):
            rows += draw(st.lists(st.sampled_from(["", "# [t.n9]", "  "]), max_size=2))
            lines["t", f"n{table}", f"k{key}"] = len(rows) + 1
            value = draw(
                st.sampled_from(["1", "'x'", "[\n 1,\n # c\n\n 2 ]", '"""a\n[t.n0]\nk0 = 1\n"""', "{ a = 1 }", "'''\n\n'''"])
            )
            rows += f"k{key} = {value}".split("\n")
    return "\n".join(rows), lines


@settings(max_examples=40)
@given(documents())
def test_lines_are_found_in_any_document(document: tuple[str, dict[tuple[str, ...], int]]) -> None:
    text, expected = document
    for path, line in expected.items():
        assert Lines(text).line_of(path) == line
        assert Lines(text.replace("\n", "\r\n")).line_of(path) == line
        assert Lines(text).line_of((*path, "missing")) == line


def test_a_huge_file_costs_a_bounded_time_to_explain() -> None:
    text = "[tenants.a]\nlabel = '''" + "\n" * 200_000 + "'''\nreview = 7\n"
    assert faults(text)[0].partition(":")[0] == "policy.toml"


# -- the keeper ------------------------------------------------------------------------------------------------------


class Kept:
    """A keeper on a file."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        path.write_text(text)
        self.metrics = Metrics()
        self.keeper = PolicyKeeper(PolicySettings(file=path), self.metrics)
        self.keeper.bind(SCALE)

    def action(self, score: float) -> str:
        return self.keeper.decide(scored(score), "t", MODEL).action

    def reloads(self, status: str) -> float | None:
        return self.metrics.registry.get_sample_value("code_worker_policy_reloads_total", {"status": status})


def rule(review: object) -> str:
    return f"[tenants.default]\nreview = {review}\n"


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "policy.toml", rule(0.3))


def test_a_changed_file_takes_over(kept: Kept) -> None:
    assert kept.action(0.2) == "allow"
    assert not kept.keeper.reload_if_changed()
    version = kept.keeper.current.version
    kept.path.write_text(rule(0.1))
    with capture_logs() as logs:
        assert kept.keeper.reload_if_changed()
    assert kept.action(0.2) == "review"
    assert kept.keeper.current.version != version
    assert kept.reloads("ok") == 1
    assert logs[0]["event"] == "policy.reloaded"
    assert kept.metrics.registry.get_sample_value(
        "code_worker_policy_info", {"name": "policy", "version": kept.keeper.current.version}
    )


def test_a_change_within_one_clock_tick_and_of_the_same_size_is_seen(kept: Kept) -> None:
    before = kept.path.stat()
    kept.path.write_text(rule(0.1))
    os.utime(kept.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert kept.keeper.reload_if_changed()


@pytest.mark.parametrize("wrong", ["review = ", rule(7), rule("'nope'"), "", None])
def test_a_wrong_file_leaves_the_old_policy_and_is_told_once(kept: Kept, wrong: str | None) -> None:
    if wrong == "":
        kept.path.write_bytes(b"\xff")
    elif wrong is None:
        kept.path.unlink()
    else:
        kept.path.write_text(wrong)
    with capture_logs() as logs:
        for _ in range(3):
            assert not kept.keeper.reload_if_changed()
    assert [(line["event"], line["log_level"]) for line in logs] == [("policy.refused", "error")]
    assert kept.reloads("failed") == 1
    assert kept.action(0.4) == "review"
    kept.path.write_text(rule(0.5))
    assert kept.keeper.reload_if_changed()
    assert kept.action(0.4) == "allow"


def test_a_wrong_file_set_right_again_is_no_change_and_the_next_fault_is_told(kept: Kept) -> None:
    kept.path.write_text("wrong")
    kept.keeper.reload_if_changed()
    kept.path.write_text(rule(0.3))
    assert not kept.keeper.reload_if_changed()
    kept.path.write_text("wrong")
    kept.keeper.reload_if_changed()
    assert kept.reloads("failed") == 2
    assert kept.reloads("ok") == 0


def test_a_config_maps_symlink_swap_is_seen(tmp_path: Path) -> None:
    for version, review in (("1", 0.3), ("2", 0.1)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "policy.toml").write_text(rule(review))
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "policy.toml").symlink_to("..data/policy.toml")
    metrics = Metrics()
    keeper = PolicyKeeper(PolicySettings(file=tmp_path / "policy.toml"), metrics)
    keeper.bind(SCALE)
    assert keeper.decide(scored(0.2), "t", MODEL).action == "allow"
    (tmp_path / "new").symlink_to("2")
    (tmp_path / "new").replace(tmp_path / "..data")
    assert keeper.reload_if_changed()
    assert keeper.decide(scored(0.2), "t", MODEL).action == "review"


def test_another_model_brings_its_own_numbers_and_the_one_before_keeps_its_own(kept: Kept) -> None:
    kept.path.write_text("[tenants.default]\nreview = 'fpr_0.01'\n")
    kept.keeper.reload_if_changed()
    other = FakeScale(version="2", thresholds={"fpr_0.01": threshold(0.5, 0.01, 0.009)})
    kept.keeper.bind(other)
    assert kept.keeper.decide(scored(0.6), "t", MODEL).action == "allow"
    assert kept.keeper.decide(scored(0.6), "t", replace(MODEL, version="2")).action == "review"
    assert kept.keeper.decide(scored(0.6), "t", replace(MODEL, version="9")).action == "review"
    kept.path.write_text("[tenants.default]\nreview = 0.65\n")
    assert kept.keeper.reload_if_changed()
    assert kept.action(0.6) == "allow"
    assert kept.keeper.decide(scored(0.6), "t", replace(MODEL, version="2")).action == "allow"


def test_a_model_the_policy_does_not_fit_is_refused_and_nothing_changes(kept: Kept) -> None:
    kept.path.write_text("[tenants.default]\nreview = 'fpr_0.01'\n")
    kept.keeper.reload_if_changed()
    with pytest.raises(ConfigurationError, match=r"policy\.toml:2: tenants\.default\.review: model code-tiny 2"):
        kept.keeper.bind(FakeScale(version="2", thresholds={}))
    assert kept.keeper.decide(scored(0.85), "t", replace(MODEL, version="2")).action == "review"
    assert kept.keeper.current.version == kept.keeper.policy.version


def test_shadow_decisions_are_counted(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "policy.toml", "[shadow.strict]\nreview = 0.1\n")
    for score in (0.05, 0.2, 0.3, 0.9):
        kept.keeper.decide(scored(score), "t", MODEL)
    value = kept.metrics.registry.get_sample_value

    def counted(action: str, actual: str) -> float | None:
        return value("code_worker_shadow_decisions_total", {"rule": "strict", "action": action, "actual": actual})

    assert (counted("allow", "allow"), counted("review", "allow"), counted("review", "review")) == (1, 2, 1)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("tenants = 1"), "WORKER_POLICY__FILE: policy.toml:1: tenants: must be tables"),
        (lambda path: None, "WORKER_POLICY__FILE: .*cannot read the policy: No such file"),
        (lambda path: path.mkdir(), "WORKER_POLICY__FILE: .*cannot read the policy"),
        (lambda path: path.write_bytes(b"#" * 2**19), "WORKER_POLICY__FILE: .*larger than"),
    ],
)
def test_a_wrong_file_at_start_names_setting_line_and_key(tmp_path: Path, write: Any, message: str) -> None:
    write(tmp_path / "policy.toml")
    with pytest.raises(ConfigurationError, match=message):
        PolicyKeeper(PolicySettings(file=tmp_path / "policy.toml"), Metrics())


def test_deciding_before_a_model_is_bound_is_a_mistake_in_the_program() -> None:
    with pytest.raises(RuntimeError, match="bind"):
        PolicyKeeper(PolicySettings(), Metrics()).undetermined("t")
