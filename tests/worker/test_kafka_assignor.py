"""Partitions among members: every topic level, the sum level, nothing moved without need, nobody given what another still has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from worker.kafka_assignor import EvenAssignor, Owned, share_out

TOPICS = ("image.uploads", "image.uploads.retry", "other")
SIZES = st.dictionaries(st.sampled_from(TOPICS), st.integers(1, 13), min_size=1)
MEMBERS = st.lists(st.integers(0, 9), min_size=1, max_size=7, unique=True)


def rounds(sizes: dict[str, int], members: list[str], owned: Owned) -> Owned:
    """Rebalances until nothing changes, as the protocol runs them; at most two change anything."""
    partitions = {topic: range(size) for topic, size in sizes.items()}
    subscriptions = {member: set(sizes) for member in members}
    now = {member: owned.get(member, set()) for member in members}
    for number in range(3):
        after = share_out(partitions, subscriptions, now)
        for member, given_now in after.items():
            for other in members:
                assert other == member or not given_now & now[other], "given away while its owner still has it"
        if after == now:
            break
        assert number < 2, "a third round changed something"
        now = after
    return now


def check_level(sizes: dict[str, int], shared: Owned) -> None:
    everything = sorted(one for owned in shared.values() for one in owned)
    assert everything == sorted((topic, number) for topic, size in sizes.items() for number in range(size))
    for topic in sizes:
        counts = [sum(one[0] == topic for one in owned) for owned in shared.values()]
        assert max(counts) - min(counts) <= 1, topic
    counts = [len(owned) for owned in shared.values()]
    assert max(counts) - min(counts) <= 1


@given(SIZES, st.lists(MEMBERS, min_size=1, max_size=6))
def test_level_whoever_comes_and_goes(sizes: dict[str, int], history: list[list[int]]) -> None:
    owned: Owned = {}
    for numbers in history:
        members = [f"member-{number}" for number in numbers]
        before, owned = owned, rounds(sizes, members, owned)
        check_level(sizes, owned)
        for member in members:  # who gave something up of a topic has no more of it than an even share
            for topic in sizes:
                lost = {one for one in before.get(member, set()) - owned[member] if one[0] == topic}
                gained = {one for one in owned[member] - before.get(member, set()) if one[0] == topic}
                assert not (lost and gained), "exchanged for nothing"


def test_a_worker_that_joins_gets_half_of_each_topic() -> None:
    sizes = {"image.uploads": 12, "image.uploads.retry": 12}
    alone = rounds(sizes, ["a"], {})
    both = rounds(sizes, ["a", "b"], alone)
    assert [sum(topic == "image.uploads" for topic, _ in both[member]) for member in "ab"] == [6, 6]
    assert both["a"] <= alone["a"]


def test_what_two_members_claim_is_taken_from_both_first() -> None:
    claimed = {("t", 0), ("t", 1)}
    shared = share_out({"t": range(4)}, {"a": {"t"}, "b": {"t"}}, {"a": set(claimed), "b": set(claimed)})
    assert not claimed & (shared["a"] | shared["b"])
    check_level({"t": 4}, rounds({"t": 4}, ["a", "b"], shared))


def test_members_read_different_topics() -> None:
    subscriptions = {"a": {"t", "u"}, "b": {"t"}}
    shared = share_out({"t": range(4), "u": range(3)}, subscriptions, {"a": set(), "b": set()})
    assert {one for one in shared["a"] if one[0] == "u"} == {("u", 0), ("u", 1), ("u", 2)}
    assert len(shared["b"]) == 2


def test_a_topic_nobody_knows_yet_is_nobodys() -> None:
    assert share_out({"t": ()}, {"a": {"t"}}, {"a": set()}) == {"a": set()}


def test_it_speaks_the_clients_language() -> None:
    assignors = {name: EvenAssignor() for name in "ab"}
    sizes = {"image.uploads": {0, 1, 2}, "image.uploads.retry": {0, 1, 2}}
    cluster: Any = SimpleNamespace(partitions_for_topic=sizes.get)

    def rebalance() -> None:
        members = [
            SimpleNamespace(member_id=name, metadata=type(sent).decode(sent.encode()))
            for name in assignors
            for sent in [assignors[name].metadata(set(sizes))]
        ]
        for name, assignment in assignors["a"].assign(cluster, members).items():
            decoded = type(assignment).decode(assignment.encode())
            assignors[name].on_assignment(decoded, 1)

    rebalance()
    rebalance()
    found = {name: sorted(tuple(one) for one in assignor.member_assignment) for name, assignor in assignors.items()}
    assert sorted(found["a"] + found["b"]) == sorted((topic, number) for topic in sizes for number in range(3))
    assert {len(owned) for owned in found.values()} == {3}
    assert EvenAssignor.name == "cooperative-sticky"
