"""Clients' addresses: who counts as one client, and which peers only pass requests on."""

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

Network = IPv4Network | IPv6Network
# A client has a network of its own: with IPv6 it could come from another address each time.
_SHARED_V6 = 64


def client_of(address: str) -> str:
    """Return what a client is counted by: its IPv4 address, or its IPv6 network."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:  # a Unix socket has none
        return address
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(IPv6Network((parsed, _SHARED_V6), strict=False))


class Proxies:
    """The peers that pass others' requests on, and say whose."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks

    def client_behind(self, peer: str, forwarded: str) -> str:
        """Return the address of the client whose request a peer sent.

        `forwarded` is X-Forwarded-For, to which each proxy adds whom it was called by. Only what
        trusted proxies added counts: read from the end, the first that is none of them. Anybody can
        send the header, so that of another peer is ignored, and so is one that is no address.
        """
        client = peer
        for named in reversed(forwarded.split(",")):
            if not self.trusts(client):
                break
            try:
                client = str(ip_address(named.strip()))
            except ValueError:
                break
        return client

    def trusts(self, address: str) -> bool:
        """Return whether a peer is one of them."""
        if not self._networks:
            return False
        try:
            parsed = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        return any(parsed in network for network in self._networks)
