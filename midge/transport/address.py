"""Where the broker is, and how to prove who we are: one URL, and files that exist.

    scheme  encryption  carried over   port
    mqtt    none        TCP            1883
    mqtts   TLS         TCP            8883
    ws      none        WebSocket        80
    wss     TLS         WebSocket       443

A user name and a password may stand in the URL (percent-encoded) or be given apart from it, which keeps them out of
process lists. No `str`, no `repr` and no error of this file shows a password.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
DEFAULT_WEBSOCKET_PATH = "/mqtt"

_CREDENTIALS = re.compile(r"(?<=//).*@", re.DOTALL)
_MAX_PORT = 65_535


class AddressError(ValueError):
    """The broker's address cannot be used as it was given. The message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A broker, and the credentials for it.

    Attributes:
        scheme: "mqtt", "mqtts", "ws" or "wss".
        host: a name or an IP address; an IPv6 address stands here without brackets.
        port: TCP port, 1 to 65535.
        path: of a WebSocket; empty for the other schemes.
        username: user name; None for anonymous.
        password: password of that user, never shown.
        ca_file: certificates (PEM) that the broker's must be signed by; None for those that the system trusts.
        cert_file: our certificate (PEM), where the broker asks for one.
        key_file: its private key (PEM, not encrypted).

    Raises:
        AddressError: a part is missing, malformed, or contradicts another one.
    """

    scheme: str
    host: str
    port: int
    path: str = ""
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def __post_init__(self) -> None:
        if self.password is not None and self.username is None:
            raise AddressError(f"broker {self}: a password without a user name: give both")
        files = {"ca_file": self.ca_file, "cert_file": self.cert_file, "key_file": self.key_file}
        given = [name for name, path in files.items() if path is not None]
        if given and not self.uses_tls:
            safe = {"mqtt": "mqtts", "ws": "wss"}[self.scheme]
            raise AddressError(
                f"broker {self}: {', '.join(given)} given, but {self.scheme}:// has no TLS: use {safe}://"
            )
        if (self.cert_file is None) != (self.key_file is None):
            missing, present = ("key_file", "cert_file") if self.key_file is None else ("cert_file", "key_file")
            raise AddressError(f"broker {self}: {present} without {missing}: a client certificate needs both")
        for name, path in files.items():
            if path is not None and not path.is_file():
                raise AddressError(f"broker {self}: {name} {path} does not exist or is not a file")

    @classmethod
    def parse(
        cls,
        url: str,
        *,
        username: str | None = None,
        password: str | None = None,
        ca_file: str | Path | None = None,
        cert_file: str | Path | None = None,
        key_file: str | Path | None = None,
    ) -> Address:
        """The address in `url`. What is given beside it wins over what stands in it.

        Raises:
            AddressError: the URL or a file cannot be used.
        """
        parts = _split(url)
        return cls(
            scheme=parts.scheme,
            host=_host(parts, url),
            port=_port(parts, url),
            path=_path(parts, url),
            username=username if username is not None else _decoded(parts.username or None),
            password=password if password is not None else _decoded(parts.password),
            ca_file=_file(ca_file),
            cert_file=_file(cert_file),
            key_file=_file(key_file),
        )

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted and the broker's certificate checked."""
        return self.scheme in ("mqtts", "wss")

    @property
    def uses_websocket(self) -> bool:
        """Whether MQTT is carried over a WebSocket."""
        return self.scheme in ("ws", "wss")

    @property
    def endpoint(self) -> str:
        """Host and port, as they stand in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.endpoint}{self.path}"


def _split(url: str) -> SplitResult:
    shown = _redacted(url)
    if any(character.isspace() or not character.isprintable() for character in url):
        raise AddressError(f"broker {shown!r}: a space or a control character in the URL")
    if "://" not in url:
        raise AddressError(f"broker {shown!r}: expected a URL such as mqtt://{shown or 'broker.example.com'}")
    try:
        parts = urlsplit(url)
    except ValueError:  # its text may show the whole URL, password and all
        raise AddressError(f"broker {shown!r}: malformed host, expected a name, 192.0.2.7 or [2001:db8::1]") from None
    if parts.scheme not in DEFAULT_PORTS:
        raise AddressError(f"broker {shown!r}: expected mqtt://, mqtts://, ws:// or wss://, not {parts.scheme}://")
    if "@" in parts.path + parts.query + parts.fragment:
        raise AddressError(f"broker {shown!r}: percent-encode the signs / ? # @ in the user name and the password")
    if parts.query or parts.fragment:
        raise AddressError(f"broker {shown!r}: expected nothing after ? or #")
    return parts


def _host(parts: SplitResult, url: str) -> str:
    if not parts.hostname:
        raise AddressError(f"broker {_redacted(url)!r}: no host, expected {parts.scheme}://HOST:PORT")
    return parts.hostname


def _port(parts: SplitResult, url: str) -> int:
    problem = AddressError(f"broker {_redacted(url)!r}: bad port, expected a number from 1 to {_MAX_PORT}")
    try:
        port = parts.port
    except ValueError:
        raise problem from None
    if port is None:
        return DEFAULT_PORTS[parts.scheme]
    if port == 0:
        raise problem
    return port


def _path(parts: SplitResult, url: str) -> str:
    if parts.scheme in ("ws", "wss"):
        return parts.path or DEFAULT_WEBSOCKET_PATH
    if parts.path not in ("", "/"):
        raise AddressError(f"broker {_redacted(url)!r}: {parts.scheme}:// takes no path, seen {parts.path!r}")
    return ""


def _decoded(text: str | None) -> str | None:
    return None if text is None else unquote(text)


def _file(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _redacted(url: str) -> str:
    return _CREDENTIALS.sub("***@", url)
