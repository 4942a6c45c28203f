"""TLS as the address says: the broker's certificate is always checked, and ours is shown where there is one."""

from __future__ import annotations

import ssl

from midge.transport.address import Address
from midge.transport.failures import Failure, Kind, LinkError


def tls_context(address: Address) -> ssl.SSLContext:
    """The context for one connection. Made anew for each, so that renewed certificates are taken up.

    Raises:
        LinkError: a file holds no certificate or no key, or they do not belong together.
    """
    try:
        context = ssl.create_default_context(cafile=address.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if address.cert_file is not None:
            context.load_cert_chain(address.cert_file, address.key_file, password=lambda: "")  # never ask a terminal
    except OSError as error:
        reason = f"{address}: {error}: check ca_file, cert_file and key_file (PEM, the key not encrypted)"
        raise LinkError(Failure(Kind.FATAL, reason)) from error
    return context
