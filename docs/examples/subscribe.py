"""Prints each policy event once: an example of a component that reads events (docs/events.md).

    python subscribe.py NATS_URL READER FILE [FOLDER]

READER is a name in the servers' `event_readers`; FILE keeps the ids of the events that were handled; FOLDER has the
certificates that `silkbus nats-config` wrote for READER. JetStream delivers again what was not acknowledged, and all of
it when its storage was lost, so the id decides whether an event is new.
"""

import asyncio
import sqlite3
import ssl
import sys
from typing import Any
from urllib.parse import unquote

import msgpack
import nats
from nats.errors import Error


async def main(url: str, reader: str, file: str, folder: str = "") -> None:
    done = sqlite3.connect(file)
    done.execute("CREATE TABLE IF NOT EXISTS done (id TEXT PRIMARY KEY)")
    options: dict[str, Any] = {"inbox_prefix": f"_INBOX.reader.{reader}", "max_reconnect_attempts": -1}
    if folder:
        options["tls"] = ssl.create_default_context(cafile=f"{folder}/ca.crt")
        options["tls"].load_cert_chain(f"{folder}/client.crt", f"{folder}/client.key")
    client = await nats.connect(url, **options)
    events = await client.jetstream().pull_subscribe_bind(reader, "SILKBUS_POLICIES")
    while True:
        try:
            messages = await events.fetch(100, timeout=5)
        except (Error, TimeoutError):  # nothing new, or the bus is away, or the consumer is not made yet
            await asyncio.sleep(0.5)
            continue
        for message in messages:
            attributes = {name.removeprefix("ce-"): unquote(value) for name, value in message.headers.items()}
            with done:  # what handling an event changes belongs in the same transaction as its id
                if done.execute("INSERT OR IGNORE INTO done VALUES (?)", (attributes["id"],)).rowcount:
                    handle(attributes, msgpack.unpackb(message.data))
            await message.ack()


def handle(attributes: dict[str, str], event: dict[str, Any]) -> None:
    protocol, start, end = event["ports"]
    print(attributes["time"], attributes["type"], event["source"], "->", event["destination"], protocol, start, end)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
