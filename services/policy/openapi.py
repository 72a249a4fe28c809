"""The description of the API that the server serves: the package's `openapi.json`, OpenAPI 3.1.

The file is the source, for people and tools to read as it is; tests hold it against the routes and their answers.
"""

from functools import cache
from importlib.resources import files


@cache
def document() -> bytes:
    return files("services.policy").joinpath("openapi.json").read_bytes()
