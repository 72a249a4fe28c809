"""Explaining a flow through all services: the policy server asks, each cell looks into its kernel, containers try."""

import json
import time

import httpx
import pytest

from compose.lab import calls
from compose.lab.probe import connect, target

pytestmark = pytest.mark.system

EXPLAIN = "/networking/v1/external/explain"


def explain(lab, port=8080, **more):
    headers = {"Authorization": f"bearer {lab.layout.token.read_text().strip()}"}
    params = {"source": lab.guid("web"), "destination": lab.guid("api"), "protocol": "tcp", "port": port, **more}
    url = f"http://127.0.0.1:{lab.state.port}{EXPLAIN}"
    answer = httpx.get(url, params=params, headers=headers, timeout=30, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def verdicts(instances):
    return {(one["cell"], one["handle"]): (one["verdict"], one["kernel_agrees"]) for one in instances}


@pytest.mark.usefixtures("policy")
def test_every_instance_of_both_apps_is_heard_of_and_tried(lab):
    said = explain(lab, probe="true")
    assert said["allowed"] is True
    assert said["cells"] == {"asked": 2, "answered": 2, "silent": {"count": 0, "cells": []}, "problems": []}
    sources, destinations = said["source"]["instances"], said["destination"]["instances"]
    assert verdicts(sources) == {("cell-1", "web-0"): ("passes", True), ("cell-2", "web-1"): ("passes", True)}
    assert verdicts(destinations) == {("cell-1", "api-0"): ("passes", True), ("cell-2", "api-1"): ("passes", True)}
    addresses = {one["address"] for one in destinations}
    for source in sources:
        assert {probe["address"]: probe["outcome"] for probe in source["probes"]} == dict.fromkeys(
            addresses, "connected"
        )


@pytest.mark.usefixtures("policy")
def test_what_no_policy_allows_is_refused_everywhere(lab):
    said = explain(lab, port=9090, probe="true")
    assert said["allowed"] is False
    assert {one["verdict"] for one in said["destination"]["instances"]} == {"refused"}
    outcomes = {probe["outcome"] for one in said["source"]["instances"] for probe in one["probes"]}
    assert outcomes == {"refused"}


@pytest.mark.usefixtures("policy")
def test_a_cell_whose_enforcer_is_away_is_silent_and_named(lab):
    enforcer = lab.state.services["cell-2/enforcer"]
    enforcer.kill()
    try:
        said = explain(lab)
    finally:
        lab.start("cell-2/enforcer")
    assert said["cells"] == {"asked": 2, "answered": 1, "silent": {"count": 1, "cells": ["cell-2"]}, "problems": []}
    assert set(verdicts(said["destination"]["instances"])) == {("cell-1", "api-0")}


def test_refused_flows_are_counted_at_the_cell(lab):
    socket = lab.layout.socket("cell-2", "enforcer")
    address = lab.container("api-1").address

    def refused():
        return json.loads(calls.get(socket, "/counters")[1])["refused_packets"]["in"]

    before = refused()
    (outcome,) = connect(lab.container("web-1").namespace, [target(address, 9090)])
    assert not outcome.accepted
    assert refused() > before
    deadline = time.monotonic() + 10
    while "silkbus_enforcer_logged_total{" not in calls.get(socket, "/metrics")[1]:
        assert time.monotonic() < deadline, "nothing was logged"
        time.sleep(0.1)
