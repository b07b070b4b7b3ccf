"""Peers (c), their Kafka side: aiokafka reads, up to 64 images at a time go to the batching server; verdicts, then a commit."""

from __future__ import annotations

import asyncio
import base64
import json
import os

import aiohttp
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

URL = os.environ["PEER_URL"]
AT_ONCE = 64
AS_JSON = "PEER_JSON" in os.environ
"""LitServe hands JSON to its workers, Mosec takes bytes."""


async def main() -> None:
    """Until killed."""
    servers = os.environ["PEER_BOOTSTRAP"]
    consumer = AIOKafkaConsumer(
        "image.uploads",
        bootstrap_servers=servers,
        group_id="peer",
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        session_timeout_ms=6000,
        max_partition_fetch_bytes=8_000_000,
    )
    producer = AIOKafkaProducer(bootstrap_servers=servers, linger_ms=5, max_request_size=8_000_000)
    # Its own idle time below the five seconds of uvicorn: a request on a connection that the server just closed is not repeated.
    pool = aiohttp.TCPConnector(limit=AT_ONCE, keepalive_timeout=3)
    async with consumer, producer, aiohttp.ClientSession(connector=pool) as http:
        room = asyncio.Semaphore(AT_ONCE)

        async def judge(event_id: str, image: bytes) -> None:
            body = {"json": {"image": base64.b64encode(image).decode()}} if AS_JSON else {"data": image}
            async with room, http.post(URL, raise_for_status=True, **body) as answer:
                score = json.loads(await answer.read())["score"]
            verdict = {"event_id": event_id, "score": score}
            await producer.send_and_wait("image.verdicts", json.dumps(verdict).encode())

        while True:
            batches = await consumer.getmany(timeout_ms=50, max_records=256)
            records = [record for batch in batches.values() for record in batch]
            await asyncio.gather(*(judge(dict(record.headers)["event_id"].decode(), record.value) for record in records))
            if records:
                await consumer.commit()


if __name__ == "__main__":
    asyncio.run(main())
