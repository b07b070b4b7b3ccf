"""Peer (b): a FastStream consumer with the model called in its handler, in batches as FastStream's documentation has them.

https://faststream.ag2.ai/latest/kafka/Subscriber/batch_subscriber/ and .../Publisher/batch_publisher/
"""

from __future__ import annotations

import asyncio
import os

import numpy as np
from faststream import AckPolicy, FastStream
from faststream.kafka import KafkaBroker, KafkaMessage

from benchmarks.peers.model import Model, crop

broker = KafkaBroker(os.environ["PEER_BOOTSTRAP"], max_request_size=8_000_000, linger_ms=5)
app = FastStream(broker)
model = Model()


def judge(images: list[bytes]) -> list[float]:
    """Decode and score a batch."""
    return model(np.stack([crop(image) for image in images]))


@broker.subscriber(
    "image.uploads",
    batch=True,
    max_records=32,
    batch_timeout_ms=5,
    group_id="peer",
    auto_offset_reset="earliest",
    session_timeout_ms=6000,
    max_partition_fetch_bytes=8_000_000,
    ack_policy=AckPolicy.NACK_ON_ERROR,
    decoder=lambda message: message.body,
)
@broker.publisher("image.verdicts", batch=True)
async def handle(images: list[bytes], message: KafkaMessage) -> list[dict[str, object]]:
    """A batch of uploads becomes a batch of verdicts; the offsets are committed when it is published."""
    scores = await asyncio.to_thread(judge, images)
    ids = [dict(record.headers)["event_id"].decode() for record in message.raw_message]
    return [{"event_id": event_id, "score": score} for event_id, score in zip(ids, scores, strict=True)]


if __name__ == "__main__":
    asyncio.run(app.run())
