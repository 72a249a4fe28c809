"""The database server that central jobs run on."""

from tests.databases import postgresql

__all__ = ["postgresql"]
