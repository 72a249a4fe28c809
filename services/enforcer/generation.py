"""The generation of nf_tables: a number of the kernel that each committed change of a namespace's rules adds 1 to."""

import socket
import struct

_NETLINK_NETFILTER = 12
_NEWGEN, _GETGEN = (10 << 8) | 15, (10 << 8) | 16  # NFNL_SUBSYS_NFTABLES; NFT_MSG_NEWGEN, NFT_MSG_GETGEN
_REQUEST = 1
_GEN_ID = 1  # NFTA_GEN_ID
TIMEOUT = 5.0


def nft_generation() -> int | None:
    """The number for this thread's network namespace, or None where the kernel does not tell."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.settimeout(TIMEOUT)
        try:
            # struct nlmsghdr, struct nfgenmsg (linux/netlink.h, linux/netfilter/nfnetlink.h)
            netlink.send(struct.pack("=IHHIIBBH", 20, _GETGEN, _REQUEST, 1, 0, 0, 0, 0))
            answer = netlink.recv(4096)
        except OSError:
            return None
    if len(answer) < 28 or struct.unpack_from("=H", answer, 4)[0] != _NEWGEN:
        return None
    kind = struct.unpack_from("=H", answer, 22)[0]
    # The first attribute is the number, the one value of nfnetlink here in network byte order.
    return int(struct.unpack_from("!I", answer, 24)[0]) if kind == _GEN_ID else None
