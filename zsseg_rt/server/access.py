"""Who may come in: names that the server goes by, pages that may ask, and the token."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qs

from zsseg_rt.server.settings import ServerSettings

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_NETLOC = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_ORIGIN = re.compile(rf"(https?)://({_NETLOC.pattern})")
_STANDARD_PORTS = {"http": "80", "https": "443"}


class Refused(Exception):  # noqa: N818 - what happened to a request, not an error of ours
    """A request that is not let in.

    Attributes:
        status: HTTP status.
        close_code: Close code of a WebSocket.
        kind: What the error's body calls it.
    """

    def __init__(self, status: int, close_code: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.close_code, self.kind = status, close_code, kind


@dataclass(frozen=True, kw_only=True)
class AccessRules:
    """What is asked of every request.

    Attributes:
        hosts: Names that clients may call the server by, in lower case, without brackets.
        any_address: Whether every numeric address will do as a name. A page of somebody else's,
            whose name was pointed at this machine (DNS rebinding), has a name and not a number.
        origins: Hosts whose pages may ask even if a proxy changed the request's Host.
        token: What clients must show, or None.
    """

    hosts: frozenset[str]
    any_address: bool
    origins: frozenset[str]
    token: bytes | None = field(repr=False)

    @staticmethod
    def of(settings: ServerSettings) -> AccessRules:
        """The rules that a server's settings make."""
        allowed = frozenset(name.lower().strip("[]") for name in settings.allowed_hosts)
        hosts = {*_LOCAL_NAMES, *allowed, settings.host.lower()}
        wild = settings.host in ("0.0.0.0", "::")
        if wild:
            own = socket.gethostname().lower()
            hosts |= {own, f"{own}.local"}
        return AccessRules(
            hosts=frozenset(hosts),
            any_address=wild,
            origins=allowed,
            token=None if settings.token is None else settings.token.encode(),
        )

    def check_host(self, host: str | None) -> None:
        """Refuse a request that calls the server by a name that is not its own."""
        found = _NETLOC.fullmatch((host or "").lower())
        name = found[1].strip("[]") if found else ""
        if name in self.hosts or (self.any_address and _is_address(name)):
            return
        raise Refused(
            400, 4403, "HostError",
            "Host: expected a name that this server goes by. Add yours with --allow-host.",
        )  # fmt: skip

    def check_origin(self, origin: str | None, host: str | None) -> None:
        """Refuse a request that another site's page makes."""
        if origin is None:
            return
        found = _ORIGIN.fullmatch(origin.lower())
        if found is not None:
            scheme, netloc, name = found[1], found[2], found[3]
            standard = ":" + _STANDARD_PORTS[scheme]
            same = netloc.removesuffix(standard) == (host or "").lower().removesuffix(standard)
            if same or name.strip("[]") in self.origins:
                return
        raise Refused(
            403, 4403, "OriginError",
            "Origin: expected this server's own page. Add a proxy's name with --allow-host.",
        )  # fmt: skip

    def check_token(
        self, authorization: str | None, *, protocols: Sequence[str] = (), query: bytes = b""
    ) -> None:
        """Refuse a request without the token."""
        if self.token is None:
            return
        scheme, _, shown = (authorization or "").partition(" ")
        given = [shown.strip()] if scheme.lower() == "bearer" else []
        given += [one.removeprefix("token.") for one in protocols if one.startswith("token.")]
        given += parse_qs(query.decode("latin-1")).get("token", [])
        if any([hmac.compare_digest(one.encode(), self.token) for one in given[:4]]):  # noqa: C419
            return
        raise Refused(
            401, 4401, "TokenError",
            "token: expected the one that the server was started with, as "
            "'Authorization: Bearer TOKEN'.",
        )  # fmt: skip


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
