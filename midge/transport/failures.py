"""Why a connection failed, in words that a person can act on, and how long to wait before the next attempt.

    kind           means                                                   first wait   longest
    LOST           nothing there, or the network broke: try again               0.2 s      10 s
    NO_ANSWER      it took the connection and said nothing, or closed it        0.2 s      10 s
    WRONG_VERSION  it does not speak this version of MQTT: try another one     0.02 s      10 s
    PROBED         a trial of another version went well: go on                 0.02 s      10 s
    TAKEN_OVER     another connection came with our client id                     5 s      60 s
    FATAL          a person must act: credentials, certificates                   1 s      60 s

Each wait is twice the one before, times a random factor of 0.5 to 1.5, so that a fleet does not come back as one.
"""

from __future__ import annotations

import random
import socket
import ssl
from dataclasses import dataclass
from enum import Enum, IntEnum, auto

from midge.transport.address import Address


class Kind(Enum):
    """What follows from a failure."""

    LOST = auto()
    NO_ANSWER = auto()
    WRONG_VERSION = auto()
    PROBED = auto()
    TAKEN_OVER = auto()
    FATAL = auto()


_WAITS_S = {
    Kind.LOST: (0.2, 10.0),
    Kind.NO_ANSWER: (0.2, 10.0),
    Kind.WRONG_VERSION: (0.02, 10.0),
    Kind.PROBED: (0.02, 10.0),
    Kind.TAKEN_OVER: (5.0, 60.0),
    Kind.FATAL: (1.0, 60.0),
}
_MAX_DOUBLINGS = 12


class Reason(IntEnum):
    """Reason codes of MQTT 5 (section 2.4 of the standard) that mean more than "try again"; 3.1.1's are put into them."""

    PROTOCOL_ERROR = 130
    UNSUPPORTED_VERSION = 132
    BAD_CLIENT_ID = 133
    BAD_PASSWORD = 134
    NOT_AUTHORISED = 135
    BANNED = 138
    KEEP_ALIVE_TIMEOUT = 141
    TAKEN_OVER = 142


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of a connection, or of an attempt at one."""

    kind: Kind
    reason: str

    @property
    def fatal(self) -> bool:
        """Whether trying again cannot help until a person acts."""
        return self.kind is Kind.FATAL


class LinkError(Exception):
    """A connection cannot be opened; `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class Backoff:
    """How long to wait before the next attempt.

    Args:
        jitter: where the random factors come from.
    """

    def __init__(self, jitter: random.Random) -> None:
        self._jitter = jitter
        self._num_failures = 0

    def reset(self) -> None:
        """A connection lasted: start over with short waits."""
        self._num_failures = 0

    def next_wait_s(self, kind: Kind) -> float:
        """The wait after one more failure of this kind."""
        first, longest = _WAITS_S[kind]
        wait = min(longest, first * 2.0 ** min(self._num_failures, _MAX_DOUBLINGS))
        self._num_failures += 1
        return wait * self._jitter.uniform(0.5, 1.5)


def explain_error(error: BaseException, address: Address) -> Failure:
    """What an exception of the network means."""
    match error:
        case LinkError():
            return error.failure
        case ssl.SSLError():
            return _explain_tls(error, address)
        case socket.gaierror():
            return Failure(Kind.LOST, f"{address}: the host name {address.host!r} cannot be resolved")
        case ConnectionRefusedError():
            return Failure(Kind.LOST, f"{address}: nothing listens there: is the broker running?")
        case TimeoutError():
            return Failure(Kind.LOST, f"{address}: no answer: is it switched on, and is a firewall in between?")
        case OSError():
            return Failure(Kind.LOST, f"{address}: {error.strerror or error}")
    return Failure(Kind.LOST, f"{address}: {type(error).__name__}: {error}")


def explain_refusal(code: int, name: str, address: Address, client_id: str) -> Failure:
    """What a broker means that answers our CONNECT with this reason code."""
    who = "without a user name" if address.username is None else f"as user {address.username!r}"
    match code:
        case Reason.UNSUPPORTED_VERSION:
            return Failure(Kind.WRONG_VERSION, f"{address}: the broker does not speak this version of MQTT")
        case Reason.BAD_CLIENT_ID:
            return Failure(Kind.FATAL, f"{address}: the broker does not accept the client id {client_id!r}")
        case Reason.BAD_PASSWORD | Reason.NOT_AUTHORISED:
            advice = "check user name, password and the broker's access list"
            return Failure(Kind.FATAL, f"{address}: not authorised {who}: {advice}")
        case Reason.BANNED:
            return Failure(Kind.FATAL, f"{address}: the broker has banned {client_id!r}: ask whoever runs it")
    return Failure(Kind.LOST, f"{address}: the broker refuses us for now: {name} (reason code {code})")


def explain_disconnect(code: int, name: str, address: Address, client_id: str) -> Failure:
    """What a broker means that sends DISCONNECT with this reason code."""
    match code:
        case Reason.TAKEN_OVER:
            advice = "give each its own, or end the other one"
            return Failure(Kind.TAKEN_OVER, f"{address}: another connection uses client id {client_id!r}: {advice}")
        case Reason.NOT_AUTHORISED:
            return Failure(Kind.FATAL, f"{address}: no longer authorised: check the broker's access list")
    return Failure(Kind.LOST, f"{address}: the broker ended the connection: {name} (reason code {code})")


def explain_end(code: int, error: OSError | None, address: Address, *, accepted: bool) -> Failure:
    """Why a connection ended without a word from the broker.

    Args:
        code: what it amounts to, as a reason code.
        error: what the socket raised, if it did.
        address: where to.
        accepted: whether the broker had taken the connection.
    """
    hint = "" if address.uses_tls else ": is this its port for connections without TLS?"
    if not accepted and code == Reason.PROTOCOL_ERROR:  # also a CONNACK of 3.1.1 that refuses the version
        return Failure(Kind.WRONG_VERSION, f"{address}: the answer to CONNECT is of another version, or not MQTT{hint}")
    if not accepted and not isinstance(error, ssl.SSLError):
        return Failure(Kind.NO_ANSWER, f"{address}: closed without an answer to CONNECT{hint}")
    if error is not None:
        return explain_error(error, address)
    if code == Reason.KEEP_ALIVE_TIMEOUT:
        return Failure(Kind.LOST, f"{address}: no answer to a ping: network or broker is down")
    return Failure(Kind.LOST, f"{address}: connection lost")


def _explain_tls(error: ssl.SSLError, address: Address) -> Failure:
    detail = (getattr(error, "reason", None) or str(error)).upper()
    if isinstance(error, ssl.SSLCertVerificationError):
        advice = "give the certificate of the CA that signed it (ca_file), and use the name that it was made out to"
        return Failure(
            Kind.FATAL, f"{address}: the broker's certificate is not trusted: {error.verify_message}: {advice}"
        )
    if "ALERT" in detail and any(word in detail for word in ("CERT", "UNKNOWN_CA", "HANDSHAKE_FAILURE")):
        advice = "it asks for one that its CA signed (cert_file, key_file)"
        return Failure(Kind.FATAL, f"{address}: the broker does not accept our certificate ({detail}): {advice}")
    if "WRONG_VERSION_NUMBER" in detail or "HTTP_REQUEST" in detail:
        advice = "use the port of its TLS listener, or a scheme without TLS"
        return Failure(Kind.FATAL, f"{address}: the broker does not speak TLS on this port: {advice}")
    return Failure(Kind.LOST, f"{address}: TLS failed: {detail}")
