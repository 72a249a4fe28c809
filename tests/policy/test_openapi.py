"""The served OpenAPI document is true: real answers of every route match it (OpenAPI 3.1, JSON Schema 2020-12)."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator, FormatChecker
from starlette.convertors import CONVERTOR_TYPES
from starlette.routing import Route

from services.policy import openapi
from services.policy.gateway import Gateway, Options
from services.policy.status_http import StatusApi
from tests.policy.server import ADMIN_TOKEN, READER_TOKEN, WRITE_TOKEN, PolicyServer, body, policy
from tests.policy.test_v0 import policy_v0

DOCUMENT = json.loads(openapi.document())
NEEDS_FAULTS = {"500", "503"}
"""Answers while something else fails: test_access and test_databases see to these."""
EXTERNAL = "/networking/{version}/external"
NEEDS_CLOUD_CONTROLLER = {(EXTERNAL + "/policies/cleanup", "POST", status) for status in ("200", "409")}
"""Answers of a server that has one: test_upkeep sees to these."""

STREAMS = {(EXTERNAL + path, "GET", "200") for path in ("/status/follow", "/events")}
"""Answers without an end: test_status sees to these."""


def follow(item: Any) -> Any:
    """The item, or what its `$ref` points to."""
    while "$ref" in item:
        found: Any = DOCUMENT
        for part in item["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        item = found
    return item


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            if method != "parameters":
                yield path, method.upper(), operation


def test_the_document_is_served(api: httpx.Client) -> None:
    answer = api.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == DOCUMENT
    assert DOCUMENT["openapi"].startswith("3.1.")


def test_every_reference_and_schema_is_valid() -> None:
    def walk(item: Any) -> None:
        if isinstance(item, dict):
            if "$ref" in item:
                assert follow(item)
            for name, value in item.items():
                if name == "schema":
                    Draft202012Validator.check_schema(value)
                walk(value)
        elif isinstance(item, list):
            for value in item:
                walk(value)

    walk(DOCUMENT)
    for schema in DOCUMENT["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(names) == len(set(names))


def test_every_route_is_in_it_and_nothing_else() -> None:
    nothing: Any = None
    status = StatusApi(nothing, nothing, nothing)
    gateway = Gateway(nothing, nothing, nothing, nothing, nothing, Options(), bus_connected=bool, status=status)
    app = gateway.application()
    assert "version" in CONVERTOR_TYPES
    routes = {
        (route.path.replace("{version:version}", "{version}"), method)
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert routes == {(path, method) for path, method, _ in operations()}


def check(answer: httpx.Response, path: str, method: str) -> str:
    """That the answer is as the document says; the status."""
    status = str(answer.status_code)
    responses = DOCUMENT["paths"][path][method.lower()]["responses"]
    assert status in responses, f"{method} {path}: {status} is not documented: {answer.text[:200]}"
    response = follow(responses[status])
    for name, header in response.get("headers", {}).items():
        header = follow(header)
        assert name in answer.headers or not header.get("required"), f"{method} {path}: {status}: no {name}"
        if name in answer.headers:
            Draft202012Validator(header["schema"]).validate(answer.headers[name])
    if "content" not in response:
        assert answer.content == b""
        return status
    ((kind, content),) = response["content"].items()
    assert answer.headers["content-type"].partition(";")[0] == kind
    value = answer.text if kind == "text/plain" else answer.json()
    # References begin at the root, so the schemas go with it.
    schema = {**content["schema"], "components": DOCUMENT["components"]}
    Draft202012Validator(schema, format_checker=FormatChecker()).validate(value)
    return status


# What brings each documented answer about: path, method, status, token, and what else the request has.
V1, V0 = body(policy("a", "b"), policy("a", "c", 5, 9, "udp")), body(policy_v0("d", "e"))
CASES: list[tuple[str, str, int, str | None, dict[str, Any]]] = [
    *(
        (path, "GET", 200, None, {})
        for path in ("/", "/networking", "/health", "/openapi.json", "/livez", "/readyz", "/metrics")
    ),
    *((path, "OPTIONS", 200, None, {}) for path, method, _ in operations() if method == "OPTIONS"),
    *((EXTERNAL + path, "POST", 200, ADMIN_TOKEN, {"json": V1}) for path in ("/policies", "/policies/delete")),
    (EXTERNAL + "/policies", "POST", 200, ADMIN_TOKEN, {"json": V1}),
    (EXTERNAL + "/policies", "POST", 200, ADMIN_TOKEN, {"json": V0, "version": "v0"}),
    *((EXTERNAL + "/policies", "GET", 200, ADMIN_TOKEN, {"version": version}) for version in ("v0", "v1")),
    *((EXTERNAL + "/history", "GET", 200, ADMIN_TOKEN, {"params": {"limit": limit}}) for limit in (1, 1000)),
    *((EXTERNAL + path, "GET", 200, ADMIN_TOKEN, {}) for path in ("/whoami", "/tags", "/policies?id=a&at=1")),
    *((EXTERNAL + "/status", "GET", 200, token, {}) for token in (ADMIN_TOKEN, WRITE_TOKEN)),
    *((EXTERNAL + path, "GET", 400, ADMIN_TOKEN, {}) for path in ("/status?revision=x", "/status/follow?other=1")),
    *(
        (EXTERNAL + f"/explain?source=a&destination={other}&protocol=tcp&port=8080", "GET", 200, ADMIN_TOKEN, {})
        for other in ("b", "c", "nobody")
    ),
    (EXTERNAL + "/explain?source=a", "GET", 400, ADMIN_TOKEN, {}),
    *((EXTERNAL + path, "POST", 400, ADMIN_TOKEN, {"content": "{"}) for path in ("/policies", "/policies/delete")),
    *((EXTERNAL + path, "GET", 400, ADMIN_TOKEN, {}) for path in ("/policies?at=x", "/history?limit=0")),
    (EXTERNAL + "/policies/cleanup", "POST", 501, ADMIN_TOKEN, {}),
    (EXTERNAL + "/policies?at=1000000", "GET", 404, ADMIN_TOKEN, {}),
    *(
        (EXTERNAL + path, method, status, token, {"version": version})
        for path, method in (
            ("/whoami", "GET"),
            ("/tags", "GET"),
            ("/history", "GET"),
            ("/status", "GET"),
            ("/status/follow", "GET"),
            ("/events", "GET"),
            ("/explain", "GET"),
            ("/policies", "GET"),
            ("/policies", "POST"),
            ("/policies/delete", "POST"),
            ("/policies/cleanup", "POST"),
        )
        for status, token, version in ((401, "wrong", "v1"), (403, READER_TOKEN, "v0"), (406, WRITE_TOKEN, "v2"))
    ),
]


def test_answers_are_as_documented(standing_server: PolicyServer) -> None:
    seen = set()
    with httpx.Client(base_url=standing_server.url, trust_env=False, timeout=60) as client:

        def ask(path: str, method: str, token: str | None, **more: Any) -> httpx.Response:
            headers = {**more.pop("headers", {}), **({"Authorization": f"bearer {token}"} if token else {})}
            version = more.pop("version", "v1")
            answer = client.request(method, path.replace("{version}", version), headers=headers, **more)
            seen.add((path.partition("?")[0], method, check(answer, path.partition("?")[0], method)))
            return answer

        for path, method, status, token, more in CASES:
            assert ask(path, method, token, **more).status_code == status, (path, method)
        tag = ask(EXTERNAL + "/policies", "GET", ADMIN_TOKEN).headers["ETag"]
        same = ask(EXTERNAL + "/policies", "GET", ADMIN_TOKEN, headers={"If-None-Match": tag})
        assert (same.status_code, same.headers["ETag"]) == (304, tag)
        ask(EXTERNAL + "/policies/delete", "POST", ADMIN_TOKEN, json=body(policy("a", "b")))
        changed = ask(EXTERNAL + "/policies", "GET", ADMIN_TOKEN, headers={"If-None-Match": f'"x", {tag}'})
        assert changed.status_code == 200
    documented = {
        (path, method, status)
        for path, method, operation in operations()
        for status in operation["responses"]
        if status not in NEEDS_FAULTS
    }
    assert documented - seen == NEEDS_CLOUD_CONTROLLER | STREAMS


@pytest.mark.parametrize("status", sorted(NEEDS_FAULTS))
def test_answers_to_faults_are_errors_like_the_others(status: str) -> None:
    for path, _, operation in operations():
        if status in operation["responses"] and path != "/readyz":
            content = follow(operation["responses"][status])["content"]
            assert content == {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
