"""The event stream: what happened to a table, for other components, on JetStream.

    SQL ──change log──▶ Relay ──▶ stream SILKBUS_TABLE ──▶ anybody who may read (docs/events.md)

Events of containers come from the cells (services/networker/outbox.py); `keeper` makes their stream.

`event` is an event's id and form; `stream` is the JetStream side; `relay` carries the one to the other. Nothing in
Silkbus itself listens to events: tables do that work, and the stream can be thrown away at any time.
"""

from bus.events.keeper import ContainerStream
from bus.events.relay import Relay

__all__ = ["ContainerStream", "Relay"]
