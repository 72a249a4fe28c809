"""Property sets and links as cf-deployment has them, with Silkbus swapped in."""

from typing import Any

from tests.bosh.release import link

CERTIFICATE = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"
KEY = "-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----"
CELL = "cf-diego-cell-0"

DATABASE: dict[str, Any] = {
    "database.type": "mysql",
    "database.username": "network_policy",
    "database.password": "p@ss/w:rd%",
    "database.host": "sql-db.service.cf.internal",
    "database.port": 3306,
    "database.name": "network_policy",
    "database.require_ssl": True,
    "database.ca_cert": CERTIFICATE,
}
NATS: dict[str, Any] = {
    "nats.servers": ["nats://10.0.0.10:4222", "nats://10.0.0.11:4222"],
    "nats.ca_cert": CERTIFICATE,
}
CENTRAL_NATS = NATS | {"nats.client_cert": CERTIFICATE, "nats.client_key": KEY}
CELL_NATS = NATS | {"nats.certificates": {CELL: {"certificate": CERTIFICATE, "private_key": KEY}}}

CC = {
    "cloud_controller_https_endpoint": {
        "properties": {
            "cc": {
                "internal_service_hostname": "cloud-controller-ng.service.cf.internal",
                "public_tls": {"port": 9024, "ca_cert": CERTIFICATE},
            }
        },
        "instances": [],
    },
    "cloud_controller_mtls_endpoint": {
        "properties": {
            "cc": {
                "internal_service_hostname": "cloud-controller-ng.service.cf.internal",
                "tls_port": 9023,
                "mutual_tls": {"ca_cert": CERTIFICATE},
            }
        },
        "instances": [],
    },
}
MUTUAL = {"ca_cert": CERTIFICATE, "server_cert": CERTIFICATE, "server_key": KEY}

POLICY_SERVER = {"uaa_client_secret": "s3cret", "uaa_ca": CERTIFICATE} | DATABASE | CENTRAL_NATS
SILK_CONTROLLER = DATABASE | {"database.name": "network_connectivity"} | MUTUAL | CENTRAL_NATS
ASG_SYNCER = {"cc_internal.client_cert": CERTIFICATE, "cc_internal.client_key": KEY}
SILK_CNI = {"dns_servers": ["169.254.0.2"]}

CELL_LINKS = {
    "cf_network": link("silk-controller", "cf_network"),
    "cni_config": link("silk-cni", "cni_config", SILK_CNI),
}
POLICY_LINKS = CC | {"asg_syncer": link("policy-server-asg-syncer", "asg_syncer", ASG_SYNCER)}
DBCONN = {
    "dbconn": link("policy-server", "dbconn", POLICY_SERVER),
    "tag_length": link("policy-server", "tag_length", POLICY_SERVER),
}

GOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "policy-server": (POLICY_SERVER, POLICY_LINKS),
    "policy-server-internal": (MUTUAL | CENTRAL_NATS, DBCONN),
    "policy-server-asg-syncer": (ASG_SYNCER, {}),
    "silk-controller": (SILK_CONTROLLER, {}),
    "silk-daemon": (CELL_NATS, CELL_LINKS),
    "vxlan-policy-agent": (CELL_NATS, CELL_LINKS),
    "garden-cni": (
        CELL_NATS
        | {"cni_config_dir": "/var/vcap/jobs/silk-cni/config/cni", "cni_plugin_dir": "/var/vcap/packages/silkbus/bin"},
        {},
    ),
    "silk-cni": (SILK_CNI, {}),
    "silkbus-nats": (
        {
            "nats.accounts": "accounts {}",
            "nats.machines": {"nats-0": {"nats-server.conf": 'jetstream {\n  store_dir: "/x"\n}'}},
        },
        {},
    ),
    "netmon": ({}, {}),
    "iptables-logger": ({}, {}),
    "silk-datastore-syncer": ({}, {}),
    "bbr-cfnetworkingdb": ({"release_level_backup": True}, {"dbconn": DBCONN["dbconn"]}),
}
"""What each job of cf-deployment has: its properties by their dotted names, and its links."""
