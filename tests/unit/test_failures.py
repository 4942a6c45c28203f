"""Failures of a connection: what is said, what follows, and how long the next attempt waits."""

from __future__ import annotations

import random
import socket
import ssl

import pytest

from midge.transport.address import Address
from midge.transport.failures import (
    Backoff,
    Failure,
    Kind,
    LinkError,
    explain_disconnect,
    explain_error,
    explain_refusal,
)

ADDRESS = Address.parse("mqtts://pi-3:s3cret@broker")


def tls_error(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, f"[SSL: {reason}] {reason.lower()} (_ssl.c:1)")
    error.reason = reason
    return error


def verification_error() -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate in certificate chain"
    return error


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (ConnectionRefusedError(111, "Connection refused"), Kind.LOST, "nothing listens there: is the broker running?"),
        (socket.gaierror(-2, "Name or service not known"), Kind.LOST, "the host name 'broker' cannot be resolved"),
        (TimeoutError("timed out"), Kind.LOST, "no answer: is it switched on"),
        (OSError(113, "No route to host"), Kind.LOST, "No route to host"),
        (ValueError("odd"), Kind.LOST, "ValueError: odd"),
        (verification_error(), Kind.FATAL, "not trusted: self-signed certificate in certificate chain: give the"),
        (tls_error("TLSV13_ALERT_CERTIFICATE_REQUIRED"), Kind.FATAL, "does not accept our certificate"),
        (tls_error("TLSV1_ALERT_UNKNOWN_CA"), Kind.FATAL, "does not accept our certificate"),
        (tls_error("TLSV1_ALERT_INTERNAL_ERROR"), Kind.LOST, "TLS failed: TLSV1_ALERT_INTERNAL_ERROR"),
        (tls_error("WRONG_VERSION_NUMBER"), Kind.FATAL, "does not speak TLS on this port"),
        (LinkError(Failure(Kind.FATAL, "as it was said")), Kind.FATAL, "as it was said"),
    ],
)
def test_an_error_is_explained_with_what_follows(error, kind, says):
    failure = explain_error(error, ADDRESS)
    assert failure.kind is kind
    assert failure.fatal is (kind is Kind.FATAL)
    assert says in failure.reason


@pytest.mark.parametrize("explain", [explain_refusal, explain_disconnect])
@pytest.mark.parametrize("code", range(128, 163))
def test_every_reason_code_has_an_explanation_without_the_password(explain, code):
    failure = explain(code, "Name of the code", ADDRESS, "pi-3")
    assert failure.reason.startswith("mqtts://broker:8883: ")
    assert "s3cret" not in failure.reason


def test_waits_double_up_to_their_limit():
    backoff = Backoff(random.Random(0))
    backoff._jitter.uniform = lambda low, high: 1.0
    assert [backoff.next_wait_s(Kind.LOST) for _ in range(8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    backoff.reset()
    assert backoff.next_wait_s(Kind.LOST) == 0.2


def test_what_a_person_must_mend_waits_longer():
    backoff = Backoff(random.Random(0))
    backoff._jitter.uniform = lambda low, high: 1.0
    assert [backoff.next_wait_s(Kind.FATAL) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_waits_are_spread_from_half_to_one_and_a_half():
    waits = [Backoff(random.Random(seed)).next_wait_s(Kind.LOST) for seed in range(200)]
    assert all(0.1 <= wait <= 0.3 for wait in waits)
    assert min(waits) < 0.12
    assert max(waits) > 0.28


def test_a_wait_stays_finite_after_any_number_of_failures():
    backoff = Backoff(random.Random(0))
    assert max(backoff.next_wait_s(Kind.LOST) for _ in range(5000)) <= 15.0
