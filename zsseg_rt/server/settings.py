"""Where the server listens, who may come in, and how much they may use."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socket
from dataclasses import dataclass

from zsseg_rt.common.settings import Option, documented, setting
from zsseg_rt.errors import ArgumentError

_TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,128}")
_HOST = re.compile(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+")
_UNSENT = 1 << 17  # bytes


@documented
@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that clients may use. Whoever goes beyond is refused or dropped."""

    connections: int = setting(128, "Open connections, of all kinds.")
    connections_per_address: int = setting(
        32, "Those of one address; of IPv6, of one network of 64 bits."
    )
    viewers: int = setting(16, "WebSockets that watch.")
    motion_jpegs: int = setting(8, "Clients of ``/stream.mjpg``.")
    ack_seconds: float = setting(15.0, "Until a viewer has acknowledged a frame.")
    stuck_seconds: float = setting(10.0, "Without a byte taken while bytes wait for the client.")
    request_seconds: float = setting(10.0, "Until a request, its body included, has come in whole.")
    json_bytes: int = setting(1 << 16, "A body in JSON.")
    picture_bytes: int = setting(1 << 25, "A picture to label.")
    picture_pixels: int = setting(32_000_000, "Height times width of a picture to label.")
    message_bytes: int = setting(4096, "A message of a viewer.")
    name_length: int = setting(200, "Characters of a class name.")
    pictures: int = setting(4, "Pictures that are received, wait or are labelled at a time.")
    changes: int = setting(4, "Changes of classes or settings at the same time.")


def _read_token(text: str) -> str | None:
    return secrets.token_urlsafe(24) if text == "new" else text or None


@documented
@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server listens.

    Raises:
        ArgumentError: A setting is outside its range, or a token is needed and absent.
    """

    host: str = setting(
        "127.0.0.1",
        "Address or name to listen on. Others than this machine's own loopback need a token.",
        "Address to listen on; any but this machine's own needs a token.",
    )
    port: int = setting(
        8000,
        "TCP port; 0 takes a free one.",
        Option("Port; 0 takes a free one.", extra={"min": 0, "max": 65535}),
    )
    token: str | None = setting(
        None,
        "What clients must show, 16 to 128 letters, digits, ``-._~``; None lets all in.",
        Option(
            "Token that clients must send; 'new' makes one.",
            read=_read_token,
            extra={"envvar": "ZSSEG_TOKEN"},
        ),
        repr=False,
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "Further names that clients may call the server by, such as a proxy's.",
        Option(
            "Another name of the server, such as a proxy's; may repeat.",
            ("--allow-host",),
            kind=list[str] | None,
        ),
    )
    proxies: tuple[str, ...] = setting(
        (),
        "Addresses or networks whose connections carry many clients: they count together only, "
        "not per address.",
        Option(
            "Address or network of a proxy with many clients; may repeat.",
            ("--proxy",),
            kind=list[str] | None,
        ),
    )
    stale_seconds: float = setting(
        5.0,
        "Without a new frame for so long, the server reports that it is not healthy.",
        Option("Seconds without a new frame after which /healthz answers 503.", ("--stale-after",)),
    )
    loop: bool = setting(False, "Whether video files begin again at their end.")
    limits: Limits = setting(Limits, "The most that clients may use.")

    def __post_init__(self) -> None:
        if self.token is None and not is_local(self.host):
            raise ArgumentError(
                f"token: expected one for host {self.host}, which others can reach, got none. "
                "Add --token new, which makes one, or set ZSSEG_TOKEN; or stay on 127.0.0.1 and "
                "come in through ssh -L."
            )
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise ArgumentError(
                "token: expected 16 to 128 letters, digits or -._~, got something else. "
                "--token new makes one."
            )
        for name in self.allowed_hosts:
            if not _HOST.fullmatch(name):
                raise ArgumentError(
                    f"allow-host: expected a name or an address without a port, got {name!r}"
                )
        for network in self.proxies:
            try:
                ipaddress.ip_network(network)
            except ValueError:
                raise ArgumentError(
                    "proxy: expected an address or network such as 10.0.0.7 or 10.0.0.0/24, got "
                    f"{network!r}"
                ) from None
        if not self.stale_seconds > 0.0:
            raise ArgumentError(f"stale-after: expected seconds above 0, got {self.stale_seconds}")


def is_local(host: str) -> bool:
    """Whether a host, as it was given, is reached from this machine alone."""
    return all(ipaddress.ip_address(address[0]).is_loopback for _, address in _addresses(host))


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address."""
    family, address = _addresses(host)[0]
    both = address[0] == "::" and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(
            (address[0], port), family=family, backlog=128, dualstack_ipv6=both
        )
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno else exc
        raise ArgumentError(
            f"port: expected one that is free on {host}, got {port}: {reason}. "
            "Choose another with --port; 0 takes a free one."
        ) from exc
    # The newest frame alone helps little if megabytes of older ones wait in the kernel.
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
    return listener


def _addresses(host: str) -> list[tuple[socket.AddressFamily, tuple[str, ...]]]:
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise ArgumentError(
            f"host: expected an address or name of this machine, got {host!r}"
        ) from exc
    return [(entry[0], (str(entry[4][0]),)) for entry in entries]
