"""A database laid out as that of Cloud Foundry's own policy server (contract/policy.md 4.1), and its rows."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from databases import Database

POSTGRESQL = """
CREATE TABLE "groups" (id SERIAL PRIMARY KEY, guid text, type text DEFAULT 'app', UNIQUE (guid));
CREATE INDEX idx_type ON "groups" (type);
CREATE TABLE destinations (id SERIAL PRIMARY KEY, group_id int REFERENCES "groups"(id), port int, protocol text,
    start_port int, end_port int,
    CONSTRAINT unique_destination UNIQUE (group_id, start_port, end_port, protocol));
CREATE TABLE policies (id SERIAL PRIMARY KEY, group_id int REFERENCES "groups"(id),
    destination_id int REFERENCES destinations(id), UNIQUE (group_id, destination_id));
CREATE TABLE policies_info (id SERIAL PRIMARY KEY, last_updated timestamp(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6));
CREATE TABLE security_groups (id bigserial PRIMARY KEY, guid varchar(36) NOT NULL UNIQUE, name varchar(255) NOT NULL,
    rules text, staging_default boolean DEFAULT false, running_default boolean DEFAULT false,
    staging_spaces jsonb, running_spaces jsonb);
CREATE TABLE gorp_migrations (id text PRIMARY KEY, applied_at timestamptz);
CREATE TABLE gorp_lock (lock text PRIMARY KEY, acquired_at timestamptz)
"""
MYSQL = """
CREATE TABLE `groups` (id int NOT NULL AUTO_INCREMENT PRIMARY KEY, guid varchar(255), type varchar(255) DEFAULT 'app',
    UNIQUE KEY groups_guid_key (guid), KEY idx_type (type));
CREATE TABLE destinations (id int NOT NULL AUTO_INCREMENT PRIMARY KEY, group_id int, port int, protocol varchar(255),
    start_port int, end_port int, UNIQUE KEY unique_destination (group_id, start_port, end_port, protocol));
CREATE TABLE policies (id int NOT NULL AUTO_INCREMENT PRIMARY KEY, group_id int, destination_id int,
    UNIQUE KEY (group_id, destination_id),
    CONSTRAINT policies_destination_id_fkey FOREIGN KEY (destination_id) REFERENCES destinations(id));
CREATE TABLE policies_info (id int NOT NULL AUTO_INCREMENT PRIMARY KEY,
    last_updated timestamp(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6));
CREATE TABLE security_groups (id bigint NOT NULL AUTO_INCREMENT PRIMARY KEY, guid varchar(36) NOT NULL UNIQUE,
    name varchar(255) NOT NULL, rules mediumtext,
    staging_default bool DEFAULT false, running_default bool DEFAULT false, staging_spaces json, running_spaces json);
CREATE TABLE gorp_migrations (id varchar(255) PRIMARY KEY, applied_at datetime);
CREATE TABLE gorp_lock (`lock` varchar(255) PRIMARY KEY, acquired_at datetime)
"""

Flow = tuple[str, str, str, int, int]
"""Source, destination, protocol, first port, last port."""


@dataclass
class OriginalDatabase:
    """Fills such a database. `groups` has the tag of each group in use."""

    database: Database
    free: int = 300
    """How many groups there are in all, used or free; really 65535."""
    groups: dict[str, int] = field(default_factory=dict)

    async def create(self) -> None:
        statements = POSTGRESQL if self.database.url.dialect == "postgresql" else MYSQL
        for statement in statements.split(";"):
            await self.database.execute(statement)
        await self.database.execute("INSERT INTO policies_info (id) VALUES (1)")
        values = ",".join(f"({number})" for number in range(1, self.free + 1))
        await self.database.execute(self.quoted("INSERT INTO GROUPS (id) VALUES ") + values)

    def quoted(self, statement: str) -> str:
        return statement.replace("GROUPS", '"groups"' if self.database.url.dialect == "postgresql" else "`groups`")

    async def give(self, guid: str, number: int, kind: str = "app") -> None:
        """Group `number` is from now on this one."""
        query = self.quoted("UPDATE GROUPS SET guid = :guid, type = :kind WHERE id = :id")
        await self.database.execute(query, {"guid": guid, "kind": kind, "id": number})
        self.groups[guid] = number

    async def take(self, guid: str) -> None:
        """Free a group, as the original does."""
        query = self.quoted("UPDATE GROUPS SET guid = NULL, type = NULL WHERE id = :id")
        await self.database.execute(query, {"id": self.groups.pop(guid)})

    async def allow(self, flows: Iterable[Flow]) -> None:
        for source, destination, protocol, start, end in flows:
            values = {"group": self.groups[destination], "protocol": protocol, "start": start, "end": end}
            found = (
                "SELECT id FROM destinations WHERE group_id = :group AND protocol = :protocol"
                " AND start_port = :start AND end_port = :end"
            )
            number = await self.database.fetch_val(found, values)
            if number is None:
                await self.database.execute(
                    "INSERT INTO destinations (group_id, port, protocol, start_port, end_port)"
                    " VALUES (:group, :port, :protocol, :start, :end)",
                    {**values, "port": start if start == end else 0},
                )
                number = await self.database.fetch_val(found, values)
            await self.database.execute(
                "INSERT INTO policies (group_id, destination_id) VALUES (:source, :destination)",
                {"source": self.groups[source], "destination": number},
            )

    async def secure(self, guid: str, rules: Sequence[Mapping[str, Any]], spaces: Sequence[str], default: bool) -> None:
        values = {"guid": guid, "name": f"{guid}'s", "rules": json.dumps(rules), "spaces": json.dumps(spaces)}
        flag = "true" if default else "false"
        query = (
            "INSERT INTO security_groups (guid, name, rules, staging_default, running_default, staging_spaces,"
            " running_spaces) VALUES (:guid, :name, :rules, DEFAULT, FLAG, NULL, CAST(:spaces AS KIND))"
        ).replace("FLAG", flag)
        kind = "jsonb" if self.database.url.dialect == "postgresql" else "CHAR"
        await self.database.execute(query.replace("KIND", kind), values)

    async def content(self) -> list[Any]:
        """All rows, to see that none changes."""
        tables = ("GROUPS", "destinations", "policies", "policies_info", "security_groups", "gorp_migrations")
        found = []
        for table in tables:
            rows = await self.database.fetch_all(self.quoted(f"SELECT * FROM {table} ORDER BY 1"))  # noqa: S608
            found.append([tuple(dict(row).values()) for row in rows])
        return found
