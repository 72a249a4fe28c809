"""The databases that tests of the bus run on."""

from tests.databases import database, mariadb, postgresql

__all__ = ["database", "mariadb", "postgresql"]
