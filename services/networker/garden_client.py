"""Garden's HTTP API, as far as it is needed to learn what Garden knows of its containers (garden's routes and server).

`GET /ping`; `GET /containers` answers `{"Handles": [HANDLE…]}`; `GET /containers/HANDLE/properties` answers the
container's properties, texts by name. Errors have a status of 400 or more and `{"Type": …, "Message": …}`.
"""

import asyncio
import re
from typing import Any
from urllib.parse import quote

import httpx

from bus.decode import Fields, Malformed

TIMEOUT = 10.0
LONGEST_ANSWER = 4 << 20
NOT_FOUND = "ContainerNotFoundError"
_TCP = re.compile(r"(\[[0-9a-fA-F:]+\]|[^/:\s]+):[0-9]{1,5}")


class GardenError(Exception):
    """Garden cannot be asked, or answers what cannot be understood. The text says where and what."""


def check_address(address: str) -> None:
    """Raises Malformed for what is neither the path of a Unix socket nor HOST:PORT."""
    if not address.startswith("/") and not _TCP.fullmatch(address):
        raise Malformed(f"garden_address: must be the path of Garden's socket, or HOST:PORT, not {address!r}")


class GardenClient:
    def __init__(self, address: str) -> None:
        self._address = address
        unix = address.startswith("/")
        transport = httpx.AsyncHTTPTransport(uds=address if unix else None, verify=False)
        base = "http://garden" if unix else f"http://{address}"
        self._client = httpx.AsyncClient(transport=transport, base_url=base, trust_env=False, timeout=TIMEOUT)

    async def ping(self) -> None:
        """Raises GardenError if Garden is not ready."""
        await self._get("/ping")

    async def handles(self) -> set[str]:
        """The containers that Garden has. Raises GardenError."""
        answer = await self._get("/containers")
        handles = answer.get("Handles") if isinstance(answer, dict) else None
        return {handle for handle in handles or () if isinstance(handle, str)}

    async def properties(self, handle: str) -> Fields | None:
        """A container's properties; None if Garden has it no more. Raises GardenError."""
        answer = await self._get(f"/containers/{quote(handle, safe='')}/properties", gone=True)
        try:
            return None if answer is None else Fields(answer, f"Garden's properties of {handle}")
        except Malformed as error:
            raise GardenError(str(error)) from None

    async def close(self) -> None:
        await self._client.aclose()

    async def _get(self, target: str, *, gone: bool = False) -> Any:
        where = f"Garden at {self._address}: GET {target}"
        try:
            async with asyncio.timeout(TIMEOUT), self._client.stream("GET", target) as response:
                body = b""
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > LONGEST_ANSWER:
                        raise GardenError(f"{where}: the answer is longer than {LONGEST_ANSWER} bytes")
        except TimeoutError:
            raise GardenError(f"{where}: no answer within {TIMEOUT:g} s") from None
        except httpx.HTTPError as error:
            raise GardenError(
                f"{where}: {str(error) or repr(error)}; see that Garden runs, and garden_address"
            ) from None
        if gone and response.status_code == 404:
            return None
        if response.status_code >= 400:
            text = body[:200].decode(errors="replace").strip()
            raise GardenError(f"{where}: answered {response.status_code}: {text}")
        try:
            return httpx.Response(200, content=body).json()
        except ValueError as error:
            raise GardenError(f"{where}: the answer is not JSON: {error}") from None
