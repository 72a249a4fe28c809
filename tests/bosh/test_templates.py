"""Templates of the BOSH release: rendered by ERB for property sets as deployments have them, good and bad."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from bus.settings import load
from services.enforcer.settings import EnforcerSettings
from services.networker.agent import NetworkerSettings
from services.policy.internal_settings import InternalSettings
from services.policy.settings import PolicySettings
from services.silk.controller_settings import ControllerSettings
from services.silk.settings import WorkerSettings
from tests.bosh.deployment import (
    CELL,
    CELL_LINKS,
    CELL_NATS,
    CENTRAL_NATS,
    CERTIFICATE,
    DATABASE,
    GOOD,
    KEY,
    MUTUAL,
    POLICY_LINKS,
    POLICY_SERVER,
    SILK_CONTROLLER,
)
from tests.bosh.release import ADDRESS, JOBS, RELEASE, Instance, RenderError, link, render, spec

pytestmark = pytest.mark.packaging

ORIGINAL: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "data" / "original_properties.yml").read_text()
)
SETTINGS = {
    "policy-server": ("config/policy-server.json", PolicySettings),
    "policy-server-internal": ("config/policy-server-internal.json", InternalSettings),
    "silk-controller": ("config/silk-controller.json", ControllerSettings),
    "silk-daemon": ("config/silk-worker.json", WorkerSettings),
    "vxlan-policy-agent": ("config/enforcer.json", EnforcerSettings),
    "garden-cni": ("config/networker.json", NetworkerSettings),
}
OTHERS_LINKS = {
    "database",
    "cloud_controller_https_endpoint",
    "cloud_controller_mtls_endpoint",
    "cloud_controller_container_networking_info",
    "iptables",
}
"""Links that jobs of other releases provide."""


def settings_of(
    folder: Path,
    job: str,
    properties: dict[str, Any] | None = None,
    links: dict[str, Any] | None = None,
    instance: Instance | None = None,
) -> Any:
    """The settings that a job's service has, by its own loader; `properties` over the good ones."""
    good, good_links = GOOD[job]
    rendered = render(job, good | (properties or {}), good_links | (links or {}), instance)
    name, kind = SETTINGS[job]
    file = folder / "settings.json"
    file.write_text(rendered[name])
    return load(kind, file, {})


def refused(job: str, properties: dict[str, Any], links: dict[str, Any] | None = None) -> str:
    """What is said when these properties are laid over the good ones; None takes one away."""
    good, good_links = GOOD[job]
    given = {name: value for name, value in (good | properties).items() if value is not None}
    with pytest.raises(RenderError) as error:
        render(job, given, good_links if links is None else links)
    return str(error.value)


@pytest.mark.parametrize("job", ORIGINAL)
def test_jobs_have_the_originals_properties_with_its_defaults(job: str) -> None:
    ours = {name: about.get("default") for name, about in spec(job)["properties"].items()}
    assert {name: ours.get(name, "missing") for name in ORIGINAL[job]} == ORIGINAL[job]
    assert all(about["description"].strip() for about in spec(job)["properties"].values())


@pytest.mark.parametrize("job", JOBS)
def test_a_job_names_what_there_is(job: str) -> None:
    about = spec(job)
    assert about["name"] == job
    folder = RELEASE / "jobs" / job / "templates"
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert set(about["templates"]) == there
    assert {*about["packages"]} <= {each.name for each in (RELEASE / "packages").iterdir()}
    provided = {each["type"] for other in JOBS for each in spec(other).get("provides", [])}
    for each in about.get("consumes", []):
        assert each["type"] in provided | OTHERS_LINKS
        assert each.get("optional") or each["type"] in provided
    for each in about.get("provides", []):
        assert set(each["properties"]) <= set(about["properties"])


@pytest.mark.parametrize("job", JOBS)
def test_what_is_rendered_is_well_formed(job: str, tmp_path: Path) -> None:
    for name, text in render(job, *GOOD[job]).items():
        if name.endswith((".json", ".conflist")):
            json.loads(text)
        elif name.endswith(".yml"):
            assert [each["name"] for each in yaml.safe_load(text)["processes"]] == [job]
        elif name.startswith("bin/"):
            script = tmp_path / "script"
            script.write_text(text)
            subprocess.run(["bash", "-n", script], check=True, timeout=60)
            subprocess.run(["shellcheck", "--severity=info", script], check=True, timeout=60)
            assert text.startswith("#!/bin/bash\n#")


def test_scripts_of_the_release_are_sound() -> None:
    scripts = [RELEASE / "vendor", *sorted((RELEASE / "packages").glob("*/packaging"))]
    subprocess.run(["shellcheck", "--severity=info", *scripts], check=True, timeout=60)


@pytest.mark.parametrize("job", SETTINGS)
def test_settings_are_taken_by_the_service(job: str, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, job)
    assert settings.nats == "nats://10.0.0.10:4222,nats://10.0.0.11:4222"
    assert settings.nats_key == Path(f"/var/vcap/jobs/{job}/config/certs/nats.key")
    assert settings.log_level == "info"


@pytest.mark.parametrize("job", SETTINGS)
def test_any_further_setting_can_be_given(job: str, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, job, {"settings": {"log_level": "debug"}})
    assert settings.log_level == "debug"


@pytest.mark.parametrize("job", [job for job in SETTINGS if job != "garden-cni"])
def test_a_disabled_job_has_no_process(job: str) -> None:
    """It needs no other property either."""
    links = {"dbconn": link("policy-server", "dbconn"), "tag_length": link("policy-server", "tag_length"), **CELL_LINKS}
    files = render(job, {"disable": True}, links)
    assert files["monit"].strip() == ""
    if "config/bpm.yml" in files:
        assert yaml.safe_load(files["config/bpm.yml"]) == {"processes": []}
    if "bin/drain" in files:
        assert run_script(files["bin/drain"]) == "0\n"


def run_script(text: str) -> str:
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True, timeout=60).stdout


class TestPolicyServer:
    def test_settings(self, tmp_path: Path) -> None:
        settings = settings_of(tmp_path, "policy-server")
        assert settings.database == (
            "mysql://network_policy:p%40ss%2Fw%3Ard%25@sql-db.service.cf.internal:3306/network_policy"
        )
        assert (settings.database_tls, settings.database_connections) == ("verify", 200)
        assert (settings.listen, settings.debug_listen) == ("0.0.0.0:4002", "127.0.0.1:31821")
        assert (settings.auth, settings.uaa_address) == ("uaa-check", "https://uaa.service.cf.internal:8443")
        assert settings.cc_url == "https://cloud-controller-ng.service.cf.internal:9024"
        assert settings.cleanup_interval == 3600
        assert settings.max_policies == 150

    def test_properties_are_heeded(self, tmp_path: Path) -> None:
        settings = settings_of(
            tmp_path,
            "policy-server",
            {
                "policy_cleanup_interval": 5,
                "max_policies_per_app_source": 7,
                "enable_space_developer_self_service": True,
                "listen_ip": "::",
                "listen_port": 4999,
                "debug_port": 31000,
                "enable_tls": True,
                "server_cert": CERTIFICATE,
                "server_key": KEY,
                "skip_ssl_validation": True,
                "database.type": "postgres",
                "database.skip_hostname_validation": True,
                "database.connect_timeout_seconds": 9,
                "max_open_connections": 0,
                "connections_max_lifetime_seconds": 0,
                "tag_length": 3,
                "log_level": "warn",
                "allowed_cors_domains": ["https://apps.example.com"],
                "cc_hostname": "cc.example.com",
                "cc_port": 9022,
            },
        )
        assert settings.database.startswith("postgresql://")
        assert settings.database_tls == "verify-ca"
        assert (settings.database_connections, settings.database_connection_lifetime) == (10, 300)
        assert settings.database_connect_timeout == 9
        assert (settings.listen, settings.debug_listen) == ("[::]:4999", "127.0.0.1:31000")
        assert settings.server_cert_file == Path("/var/vcap/jobs/policy-server/config/certs/server.crt")
        assert (settings.cleanup_interval, settings.max_policies, settings.tag_length) == (300, 7, 3)
        assert settings.skip_ssl_validation
        assert settings.enable_space_developer_self_service
        assert settings.log_level == "warning"
        assert settings.allowed_cors_domains == ("https://apps.example.com",)
        assert (settings.cc_url, settings.cc_ca_cert) == ("http://cc.example.com:9022", None)

    def test_security_groups_are_followed_where_the_syncers_job_is(self, tmp_path: Path) -> None:
        followed = settings_of(tmp_path, "policy-server")
        assert followed.asg_poll_interval_seconds == 60
        assert followed.cc_internal_url == "https://cloud-controller-ng.service.cf.internal:9023"
        disabled = {"asg_syncer": link("policy-server-asg-syncer", "asg_syncer", {"disable": True})}
        assert settings_of(tmp_path, "policy-server", links=disabled).asg_poll_interval_seconds == 0
        without = {name: value for name, value in POLICY_LINKS.items() if name != "asg_syncer"}
        rendered = render("policy-server", POLICY_SERVER, without)
        assert json.loads(rendered["config/policy-server.json"])["asg_poll_interval_seconds"] == 0

    def test_the_database_and_nats_may_come_by_links(self) -> None:
        properties = {name: value for name, value in POLICY_SERVER.items() if name != "database.host"}
        properties = {name: value for name, value in properties.items() if not name.startswith("nats.")}
        links = POLICY_LINKS | {
            "database": {"properties": {}, "instances": [{"address": "10.0.2.1"}, {"address": "10.0.2.2"}]},
            "nats": link("silkbus-nats", "nats", {}, "10.0.0.10", "10.0.0.11"),
        }
        settings = json.loads(render("policy-server", properties, links)["config/policy-server.json"])
        assert "@10.0.2.1:3306/" in settings["database"]
        assert settings["nats"] == "nats://10.0.0.10:4222,nats://10.0.0.11:4222"
        assert "nats_ca" not in settings

    @pytest.mark.parametrize("name", ["type", "username", "password", "port", "name"])
    def test_the_database_must_be_named(self, name: str) -> None:
        assert refused("policy-server", {f"database.{name}": None}) == f"database.{name} must be specified"

    @pytest.mark.parametrize(
        ("properties", "text"),
        [
            ({"database.host": None}, "must provide database link or set database.host"),
            ({"database.type": "oracle"}, "unknown driver oracle"),
            ({"policy_cleanup_interval": 0}, "policy_cleanup_interval must be at least 1 minute"),
            ({"nats.servers": None}, "nats.servers must be specified, or the link nats be provided by the job silkbus"),
            ({"nats.client_key": None}, "set all three or none, not ca_cert, client_cert alone"),
            ({"uaa_client_secret": None}, "Can't find property 'uaa_client_secret'"),
            ({"enable_tls": True}, "server_cert must be specified with enable_tls"),
            ({"log_level": "loud"}, "log_level: 'loud' is none of debug, info"),
        ],
    )
    def test_bad_properties(self, properties: dict[str, Any], text: str) -> None:
        assert text in refused("policy-server", properties)

    @pytest.mark.parametrize("address", ["010.0.0.1", "banana", "10.0.0.256"])
    def test_a_bad_listen_ip(self, address: str) -> None:
        assert refused("policy-server", {"listen_ip": address}).startswith(f"Invalid listen_ip '{address}': ")

    @pytest.mark.parametrize("seconds", [0, -1, "soon", 1.5])
    def test_a_bad_interval_of_the_syncer(self, seconds: object) -> None:
        syncer = {"asg_syncer": link("policy-server-asg-syncer", "asg_syncer", {"asg_poll_interval_seconds": seconds})}
        text = refused("policy-server", {}, POLICY_LINKS | syncer)
        assert text == f"asg_poll_interval_seconds must be an integer of at least 1, not '{seconds}'"

    def test_no_cloud_controller(self) -> None:
        assert refused("policy-server", {}, {}) == (
            "`cc_hostname` and `cc_port` properties were not supplied as manifest properties, "
            "nor were found in `cloud_controller_https_endpoint` link"
        )

    def test_one_instance_migrates(self) -> None:
        first = render("policy-server", *GOOD["policy-server"], Instance("api"))["bin/pre-start"]
        second = render("policy-server", *GOOD["policy-server"], Instance("api", 1, bootstrap=False))["bin/pre-start"]
        assert "policy migrate" in first
        assert "migrate" not in second


class TestSilkController:
    def test_settings(self, tmp_path: Path) -> None:
        settings = settings_of(tmp_path, "silk-controller")
        assert [str(each) for each in settings.overlay_network] == ["10.255.0.0/16"]
        assert (settings.subnet_prefix_length, settings.lease_expiry) == (24, 168 * 3600)
        assert (settings.listen, settings.health_check_port) == ("0.0.0.0:4103", 19683)

    def test_several_networks(self, tmp_path: Path) -> None:
        networks = ["10.255.0.0/16", "10.200.3.4/17"]
        controller = settings_of(tmp_path, "silk-controller", {"network": networks})
        assert [str(each) for each in controller.overlay_network] == ["10.255.0.0/16", "10.200.0.0/17"]
        links = {"cf_network": link("silk-controller", "cf_network", {"network": networks})}
        for job in ("silk-daemon", "vxlan-policy-agent"):
            assert settings_of(tmp_path, job, links=links).overlay_network == controller.overlay_network

    @pytest.mark.parametrize(
        ("properties", "text"),
        [
            ({"subnet_prefix_length": 31}, "subnet_prefix_length must be a number between 1 and 30, not '31'"),
            ({"subnet_prefix_length": 0}, "subnet_prefix_length must be a number between 1 and 30, not '0'"),
            ({"subnet_prefix_length": 16}, "subnet_prefix_length must be more than the prefix of network, 16, not 16"),
            ({"network": "banana"}, "network 'banana' must be a CIDR"),
            ({"network": "fd00::/64"}, "network 'fd00::/64' must be IPv4"),
            ({"database.type": "sqlite"}, "unknown driver sqlite"),
            ({"database.username": None}, "database.username must be specified"),
            ({"database.host": None}, "must provide database link or set database.host"),
        ],
    )
    def test_bad_properties(self, properties: dict[str, Any], text: str) -> None:
        assert text in refused("silk-controller", properties)


class TestCell:
    def test_its_services_agree(self, tmp_path: Path) -> None:
        worker = settings_of(tmp_path, "silk-daemon")
        enforcer = settings_of(tmp_path, "vxlan-policy-agent")
        networker = settings_of(tmp_path, "garden-cni")
        for name in ("cell", "run_dir", "state_dir"):
            assert getattr(worker, name) == getattr(enforcer, name) == getattr(networker, name)
        assert worker.cell == CELL
        assert worker.overlay_network == enforcer.overlay_network
        assert (worker.vtep_port, worker.vtep_name) == (enforcer.vtep_port, enforcer.vtep_name)
        assert str(worker.underlay) == str(enforcer.instance_address) == ADDRESS
        assert worker.health_port == 23954

    def test_what_silk_cni_says_is_done(self, tmp_path: Path) -> None:
        said = {
            "no_masquerade_cidr_range": "10.0.0.0/8",
            "mtu": 1500,
            "iptables_logging": True,
            "dns_servers": ["169.254.0.2", "8.8.8.8"],
            "rate": 1000,
            "burst": 2000,
            "iptables_denied_logs_per_sec": 3,
            "host_tcp_services": ["169.254.0.3:80"],
            "host_udp_services": ["169.254.0.4:53"],
            "deny_networks.always": ["192.168.0.0/16"],
            "deny_networks.running": ["172.16.0.0/12"],
            "deny_networks.staging": ["10.1.0.0/16"],
            "outbound_connections.limit": True,
            "outbound_connections.burst": 50,
            "outbound_connections.rate_per_sec": 5,
            "outbound_connections.dry_run": True,
        }
        links = {"cni_config": link("silk-cni", "cni_config", said)}
        worker = settings_of(tmp_path, "silk-daemon", links=links)
        assert (worker.mtu, worker.bandwidth_rate, worker.bandwidth_burst) == (1450, 1000, 2000)
        enforcer = settings_of(tmp_path, "vxlan-policy-agent", links=links)
        assert str(enforcer.no_masquerade) == "10.0.0.0/8"
        assert (enforcer.log_denied, enforcer.log_security_groups, enforcer.log_accepted) == (True, True, False)
        assert enforcer.denied_logs_per_sec == 3
        assert enforcer.host_tcp_services == ("169.254.0.3:80",)
        assert enforcer.host_udp_services == ("169.254.0.4:53",)
        assert enforcer.deny_networks_always == ("192.168.0.0/16",)
        assert enforcer.deny_networks_running == ("172.16.0.0/12",)
        assert enforcer.deny_networks_staging == ("10.1.0.0/16",)
        assert (enforcer.outbound_limit, enforcer.outbound_dry_run) == (True, True)
        assert (enforcer.outbound_burst, enforcer.outbound_rate) == (50, 5)

    def test_properties_of_the_agent_are_heeded(self, tmp_path: Path) -> None:
        enforcer = settings_of(
            tmp_path,
            "vxlan-policy-agent",
            {
                "iptables_logging": True,
                "enable_asg_syncing": False,
                "log_level": "warn",
                "iptables_accepted_udp_logs_per_sec": 9,
                "force_policy_poll_cycle_port": 9999,
                "enable_overlay_ingress_rules": True,
                "disable_container_network_policy": True,
                "unmarked_answers": True,
            },
        )
        assert enforcer.log_accepted
        assert not enforcer.dynamic_security_groups
        assert enforcer.log_level == "warning"
        assert enforcer.accepted_udp_logs_per_sec == 9
        assert enforcer.force_policy_poll_cycle_port == 9999
        assert enforcer.enable_overlay_ingress_rules
        assert enforcer.disable_container_network_policy
        assert enforcer.unmarked_answers

    def test_the_underlay_may_be_another_network(self, tmp_path: Path) -> None:
        instance = Instance(networks={"overlay-net": "10.9.0.5"})
        worker = settings_of(tmp_path, "silk-daemon", {"vxlan_network": "overlay-net"}, instance=instance)
        assert str(worker.underlay) == "10.9.0.5"
        assert "'wrong' is none of this machine's networks: default" in refused(
            "silk-daemon", {"vxlan_network": "wrong"}
        )

    def test_the_underlay_may_be_an_interface(self) -> None:
        files = render("silk-daemon", CELL_NATS | {"temporary_vxlan_interface": "lo"}, CELL_LINKS)
        assert "underlay" not in json.loads(files["config/silk-worker.json"])
        # The machine's own loopback has host scope; the script looks for a global address and says that there is none.
        done = subprocess.run(["bash", "-c", files["bin/underlay"]], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (1, "silk-daemon: temporary_vxlan_interface lo has no IPv4 address\n")

    def test_bad_properties(self) -> None:
        both = {"vxlan_network": "default", "temporary_vxlan_interface": "eth1"}
        expected = "Cannot specify both 'temporary_vxlan_interface' and 'vxlan_network' properties."
        assert refused("silk-daemon", both) == expected
        bad = {"cf_network": link("silk-controller", "cf_network", {"subnet_prefix_length": 31})}
        assert "subnet_prefix_length must be" in refused("silk-daemon", {}, CELL_LINKS | bad)
        assert "Can't find link 'cf_network'" in refused("silk-daemon", {}, {})

    @pytest.mark.parametrize("job", ["silk-daemon", "vxlan-policy-agent", "garden-cni"])
    def test_a_cell_without_a_certificate(self, job: str) -> None:
        text = refused(job, {"nats.certificates": {"cf-diego-cell-7": {}}})
        assert f"nats.certificates has none for the cell '{CELL}': run `silkbus nats-config`" in text

    @pytest.mark.parametrize("job", ["silk-daemon", "vxlan-policy-agent", "garden-cni"])
    def test_a_cell_gets_no_other_cells_key(self, job: str) -> None:
        other = {"certificate": "their certificate", "private_key": "their key"}
        certificates = CELL_NATS["nats.certificates"] | {"cf-diego-cell-1": other}
        files = render(job, CELL_NATS | {"nats.certificates": certificates}, CELL_LINKS)
        assert files["config/certs/nats.key"].strip() == KEY
        assert not [name for name, text in files.items() if "their key" in text]

    @pytest.mark.parametrize(
        ("said", "text"),
        [
            ({"dns_servers": ["08.8.8.8"]}, "Invalid dns_servers '08.8.8.8': "),
            ({"no_masquerade_cidr_range": "010.0.0.0/8"}, "Invalid no_masquerade_cidr_range '010.0.0.0/8': "),
            ({"host_tcp_services": ["127.0.0.1:80"]}, "Invalid host_tcp_services '127.0.0.1:80': loopback"),
            ({"host_udp_services": ["169.254.0.1"]}, "Invalid host_udp_services '169.254.0.1': must be ADDRESS:PORT"),
            ({"host_udp_services": ["169.254.0.01:5"]}, "Invalid host_udp_services '169.254.0.01': "),
            (
                {"deny_networks.always": ["fe80::/10"]},
                "Invalid deny_networks.always entry fe80::/10 not an IPv4 address",
            ),
            ({"deny_networks.staging": ["1.2.3"]}, "Invalid deny_networks.staging '1.2.3': "),
        ],
    )
    def test_bad_addresses(self, said: dict[str, Any], text: str) -> None:
        links = CELL_LINKS | {"cni_config": link("silk-cni", "cni_config", said)}
        assert text in refused("vxlan-policy-agent", {}, links)

    def test_silk_cni_checks_its_own(self) -> None:
        assert "Invalid dns_servers 'x': " in refused("silk-cni", {"dns_servers": ["x"]})
        assert refused("silk-cni", {"rate": 5}) == "if rate is set, burst must also be set"
        assert refused("silk-cni", {"burst": 5}) == "if burst is set, rate must also be set"


class TestGarden:
    def test_the_adapters_configuration_is_the_originals(self) -> None:
        files = render("garden-cni", GOOD["garden-cni"][0] | {"search_domains": ["apps.internal"]})
        assert json.loads(files["config/adapter.json"]) == {
            "cni_plugin_dir": "/var/vcap/packages/silkbus/bin",
            "cni_config_dir": "/var/vcap/jobs/silk-cni/config/cni",
            "bind_mount_dir": "/var/vcap/data/garden-cni/container-netns",
            "state_file": "/var/vcap/data/garden-cni/external-networker-state.json",
            "start_port": 61000,
            "total_ports": 5000,
            "log_prefix": "cfnetworking",
            "search_domains": ["apps.internal"],
            "iptables_lock_file": "/var/vcap/data/garden-cni/iptables.lock",
            "proxy_redirect_cidr": "",
            "enable_ingress_proxy_redirect": False,
            "proxy_port": 15001,
            "proxy_uid": 0,
        }

    @pytest.mark.parametrize(
        ("properties", "expected"),
        [
            ({}, ""),
            ({"experimental_proxy_redirect_cidr": "10.8.0.0/16"}, ""),
            ({"experimental_enable_proxy_redirect": True}, "127.128.0.0/9"),
            (
                {"experimental_enable_proxy_redirect": True, "experimental_proxy_redirect_cidr": "10.8.0.0/16"},
                "10.8.0.0/16",
            ),
        ],
    )
    def test_the_proxys_network(self, properties: dict[str, Any], expected: str) -> None:
        info = {"properties": {"cc": {"internal_route_vip_range": "127.128.0.0/9"}}, "instances": []}
        links = {"cloud_controller_container_networking_info": info}
        files = render("garden-cni", GOOD["garden-cni"][0] | properties, links)
        assert json.loads(files["config/adapter.json"])["proxy_redirect_cidr"] == expected

    def test_the_network_is_ours(self) -> None:
        files = render("silk-cni", *GOOD["silk-cni"])
        assert json.loads(files["config/cni/30-silkbus.conflist"])["plugins"] == [
            {"type": "silkbus-cni", "dns_servers": ["169.254.0.2"]}
        ]


class TestBackup:
    def test_only_when_asked_for(self) -> None:
        files = render("bbr-cfnetworkingdb", {}, GOOD["bbr-cfnetworkingdb"][1])
        for name in ("bin/bbr/backup", "bin/bbr/restore"):
            assert run_script(files[name]) == "script deactivated due to release_level_backup being set to FALSE\n"

    def test_the_database_is_that_of_the_policy_server(self) -> None:
        files = render("bbr-cfnetworkingdb", *GOOD["bbr-cfnetworkingdb"])
        config = json.loads(files["config/config.json"])
        assert config["adapter"] == DATABASE["database.type"]
        assert config["password"] == DATABASE["database.password"]
        assert config["tls"]["cert"]["ca"] == CERTIFICATE
        assert "cfnetworking-artifact-file" in files["bin/bbr/backup"]


def test_nothing_secret_is_in_scripts() -> None:
    secrets = {DATABASE["database.password"], POLICY_SERVER["uaa_client_secret"], KEY}
    for job in JOBS:
        for name, text in render(job, *GOOD[job]).items():
            if name.startswith("bin/") or name == "monit":
                assert not [each for each in secrets if each in text], f"{job}: {name}"


def test_originals_texts_stay_true_for_the_internal_server() -> None:
    properties = {name: value for name, value in DATABASE.items() if name != "database.name"}
    links = {
        "dbconn": link("policy-server", "dbconn", properties),
        "tag_length": link("policy-server", "tag_length"),
    }
    with pytest.raises(RenderError, match=re.escape("database.name must be specified")):
        render("policy-server-internal", MUTUAL | CENTRAL_NATS, links)
    assert SILK_CONTROLLER["database.name"] == "network_connectivity"


class TestSilkDatastoreSyncer:
    """It has no process: the networker of its cell takes its settings."""

    JOB = "silk-datastore-syncer"

    def settings(self, properties: dict[str, Any], folder: Path) -> NetworkerSettings:
        """Those with which the cell's networker starts, as its script has them."""
        script = folder / "networker"
        script.write_text(render(self.JOB, properties)["bin/networker"])
        command = ["env", "-i", "bash", "-euo", "pipefail", "-c", '. "$0"; exec env -0', str(script)]
        printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        environment = dict(each.split("=", 1) for each in printed.split("\0") if each)
        file = folder / "networker.json"
        file.write_text(render("garden-cni", *GOOD["garden-cni"])["config/networker.json"])
        return load(NetworkerSettings, file, environment)

    def test_the_networker_does_it(self, tmp_path: Path) -> None:
        settings = self.settings({}, tmp_path)
        assert settings.metadata_store == Path("/var/vcap/data/container-metadata/store.json")
        assert (settings.metadata_store_owner, settings.metadata_store_group) == ("vcap", "vcap")
        assert settings.garden_address == "/var/vcap/data/garden/garden.sock"
        assert settings.garden_sync_interval == 30

    def test_properties_are_heeded(self, tmp_path: Path) -> None:
        tcp = {"garden.network": "tcp", "garden.address": "127.0.0.1:7777", "sync_interval_in_seconds": 5}
        settings = self.settings(tcp, tmp_path)
        assert (settings.garden_address, settings.garden_sync_interval) == ("127.0.0.1:7777", 5)
        disabled = self.settings({"disable": True}, tmp_path)
        assert (disabled.metadata_store, disabled.garden_address) == (None, None)

    @pytest.mark.parametrize(
        ("properties", "text"),
        [
            ({"garden.network": "udp"}, "garden.network: 'udp' is neither unix nor tcp"),
            ({"garden.address": "garden.sock"}, "garden.address: 'garden.sock' is not the path of a socket"),
            ({"garden.network": "tcp"}, "garden.address: '/var/vcap/data/garden/garden.sock' is not HOST:PORT"),
            ({"sync_interval_in_seconds": 0}, "sync_interval_in_seconds must be an integer of at least 1, not '0'"),
        ],
    )
    def test_bad_properties(self, properties: dict[str, Any], text: str) -> None:
        with pytest.raises(RenderError, match=re.escape(text)):
            render(self.JOB, properties)
