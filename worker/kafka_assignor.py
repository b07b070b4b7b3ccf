"""Which member of the group gets which partition: each topic shared out evenly, and nothing moved without need.

kafka-python's cooperative assignor (as Kafka's own) levels the number of partitions of all topics together. A worker that joins
one that has 12 partitions of the uploads and 12 of the retries is then given the 12 of one topic: one of the two does all of the
work. Here each topic is levelled by itself, and what cannot be divided goes to whoever has least.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.protocol.consumer.metadata import ConsumerProtocolAssignment

Owned = dict[str, set[tuple[str, int]]]
"""By member the (topic, partition) it has."""


class EvenAssignor(CooperativeStickyAssignor):  # type: ignore[misc]
    """Runs at the group's leader. On the wire it is `cooperative-sticky`: members with kafka-python's own may be in the group."""

    def assign(self, cluster: Any, members: Iterable[Any]) -> dict[str, Any]:
        """By member what it has from now on; what must move is left out until its owner has given it up (KIP-429)."""
        subscriptions, owned = {}, {}
        for member in members:
            parsed = self.parse_member_metadata(member.metadata)
            subscriptions[member.member_id] = set(parsed.subscription)
            owned[member.member_id] = {(partition.topic, partition.partition) for partition in parsed.partitions}
        topics = set().union(*subscriptions.values())
        partitions = {topic: cluster.partitions_for_topic(topic) or set() for topic in topics}
        return {
            member_id: ConsumerProtocolAssignment(self.version, _by_topic(given), b"")
            for member_id, given in share_out(partitions, subscriptions, owned).items()
        }


def share_out(partitions: Mapping[str, Iterable[int]], subscriptions: Mapping[str, set[str]], owned: Owned) -> Owned:
    """One round.

    Args:
        partitions: by topic those that there are.
        subscriptions: by member the topics it reads.
        owned: by member what it says it has. A partition that two claim is taken from both.

    Returns:
        By member what it may have now. In the next round, when everybody has given up what is not theirs, the rest follows.
    """
    claims = Counter(claim for claimed in owned.values() for claim in claimed)
    target: Owned = {member: set() for member in subscriptions}
    for topic in sorted(partitions):
        readers = sorted(member for member, topics in subscriptions.items() if topic in topics)
        if readers:
            there = {(topic, number) for number in partitions[topic]}
            kept = {member: {one for one in owned[member] & there if claims[one] == 1} for member in readers}
            _share_topic(there, kept, target)
    return {
        member: {one for one in given if not claims[one] or (claims[one] == 1 and one in owned[member])}
        for member, given in target.items()
    }


def _share_topic(there: set[tuple[str, int]], kept: Owned, target: Owned) -> None:
    """Add one topic's partitions to `target`. Those that get one more than others are who has least, else who has it already."""
    share, more = divmod(len(there), len(kept))
    order = sorted(kept, key=lambda member: (len(target[member]), len(kept[member]) <= share, member))
    room = {member: share + (rank < more) for rank, member in enumerate(order)}
    stay = {member: set(sorted(kept[member])[: room[member]]) for member in kept}
    free = iter(sorted(there.difference(*stay.values())))
    for member in order:
        target[member] |= stay[member]
        target[member].update(next(free) for _ in range(room[member] - len(stay[member])))


def _by_topic(given: set[tuple[str, int]]) -> list[tuple[str, list[int]]]:
    found = defaultdict(list)
    for topic, number in sorted(given):
        found[topic].append(number)
    return sorted(found.items())
