"""Where a stream is served: ``rtsp://[USER:PASSWORD]@[HOST]:PORT/PATH``."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import unquote

from zsseg_rt.errors import ArgumentError
from zsseg_rt.stream.source import shown

_FORM = re.compile(
    r"rtsp://(?P<login>[^/?#]*)@(?P<host>[^/?#@:\[\]]*|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*)"
)
_PORT = 8554


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a stream is served.

    Attributes:
        host: The address to listen at; ``"0.0.0.0"`` is every one of this machine.
        port: The port; 0 takes any that is free.
        path: As in ``"/seg"``.
        login: User and password, or None.
    """

    host: str
    port: int
    path: str
    login: tuple[str, str] | None = field(default=None, repr=False)

    @staticmethod
    def parse(text: str) -> Address:
        """Read ``rtsp://[USER:PASSWORD]@[HOST]:PORT/PATH``."""
        found = _FORM.fullmatch(text)
        login = found["login"] if found else ""
        user, password = (unquote(part) for part in login.partition(":")[::2])
        port = int(found["port"] or _PORT) if found else 0
        if found is None or port > 65535 or (login and not (user and password)):
            raise ArgumentError(
                "sink: expected rtsp://@:PORT/NAME, rtsp://@127.0.0.1:PORT/NAME for this machine "
                f"alone, or rtsp://USER:PASSWORD@:PORT/NAME; got {shown(text)}"
            )
        return Address(
            host=found["host"].strip("[]") or "0.0.0.0",
            port=port,
            path=found["path"],
            login=(user, password) if user else None,
        )

    def shown(self, port: int | None = None) -> str:
        """The address without its login, with the port that was had in the end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        login = "***" if self.login else ""
        return f"rtsp://{login}@{host}:{self.port if port is None else port}{self.path}"

    @property
    def is_open(self) -> bool:
        """Whether other machines may watch without a password."""
        here = self.host.startswith("127.") or self.host in ("localhost", "::1")
        return self.login is None and not here


def network_of(peer: str) -> str:
    """What counts as one client's address: of IPv6 a network of 64 bits, all of which it has."""
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
