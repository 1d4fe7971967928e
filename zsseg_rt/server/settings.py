"""Where the server listens, who may come in, and how much they may use."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Limits", "ServerSettings"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that clients may use. Whoever goes beyond is refused or dropped.

    Attributes:
        connections: Open connections, of all kinds.
        viewers: WebSockets that watch.
        motion_jpegs: Clients of ``/stream.mjpg``.
        ack_seconds: Until a viewer has acknowledged a frame.
        stuck_seconds: Without a byte taken while bytes wait for the client.
        request_seconds: Until a request has come in whole, its body included.
        json_bytes: A body in JSON.
        picture_bytes: A picture to label.
        picture_pixels: Height times width of a picture to label.
        message_bytes: A message of a viewer.
        name_length: Characters of a class name.
        waiting: Pictures that wait for the engine; also changes of classes or settings.
    """

    connections: int = 128
    viewers: int = 16
    motion_jpegs: int = 8
    ack_seconds: float = 15.0
    stuck_seconds: float = 10.0
    request_seconds: float = 10.0
    json_bytes: int = 1 << 16
    picture_bytes: int = 1 << 25
    picture_pixels: int = 1 << 25
    message_bytes: int = 4096
    name_length: int = 200
    waiting: int = 4


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server listens.

    Attributes:
        host: Address or name to listen on.
        port: TCP port; 0 takes a free one.
        token: What clients must show, or None where all may come in.
        allowed_hosts: Further names that clients may call the server by.
        stale_seconds: Without a new frame for so long, the server counts as not healthy.
        limits: The most that clients may use.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    stale_seconds: float = 5.0
    limits: Limits = field(default_factory=Limits)
