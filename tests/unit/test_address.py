"""Broker addresses: what a URL means, which ones are refused, and that no password is ever shown."""

from __future__ import annotations

import pytest

from midge.transport.address import Address, AddressError

SECRET = "s3cret"


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port", "path"),
    [
        ("mqtt://broker", "mqtt", "broker", 1883, ""),
        ("mqtts://broker", "mqtts", "broker", 8883, ""),
        ("ws://broker", "ws", "broker", 80, "/mqtt"),
        ("wss://broker", "wss", "broker", 443, "/mqtt"),
        ("mqtt://broker/", "mqtt", "broker", 1883, ""),
        ("mqtt://192.0.2.7:1884", "mqtt", "192.0.2.7", 1884, ""),
        ("mqtt://[2001:db8::1]:1884", "mqtt", "2001:db8::1", 1884, ""),
        ("MQTT://Broker.Example.COM", "mqtt", "broker.example.com", 1883, ""),
        ("ws://broker:9001/", "ws", "broker", 9001, "/"),
        ("wss://broker/a/b", "wss", "broker", 443, "/a/b"),
    ],
)
def test_a_url_names_scheme_host_port_and_path(url, scheme, host, port, path):
    address = Address.parse(url)
    assert (address.scheme, address.host, address.port, address.path) == (scheme, host, port, path)


@pytest.mark.parametrize(
    ("scheme", "tls", "websocket"),
    [("mqtt", False, False), ("mqtts", True, False), ("ws", False, True), ("wss", True, True)],
)
def test_the_scheme_says_what_carries_the_connection(scheme, tls, websocket):
    address = Address.parse(f"{scheme}://broker")
    assert (address.uses_tls, address.uses_websocket) == (tls, websocket)


def test_credentials_in_the_url_are_percent_decoded():
    address = Address.parse("mqtt://pi%2D3:p%40ss%2Fw%3Ard@broker")
    assert (address.username, address.password) == ("pi-3", "p@ss/w:rd")


def test_credentials_beside_the_url_win_and_are_taken_as_they_are():
    address = Address.parse("mqtt://other:wrong@broker", username="pi-3", password="100%25")
    assert (address.username, address.password) == ("pi-3", "100%25")


def test_a_url_without_credentials_is_anonymous():
    address = Address.parse("mqtt://broker")
    assert (address.username, address.password) == (None, None)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("mqtt://broker", "mqtt://broker:1883"),
        ("mqtt://[::1]:1884", "mqtt://[::1]:1884"),
        ("wss://pi-3:s3cret@broker/mqtt", "wss://broker:443/mqtt"),
    ],
)
def test_an_address_prints_as_a_url_without_credentials(url, shown):
    assert str(Address.parse(url)) == shown


def test_repr_and_str_never_show_the_password():
    address = Address.parse(f"mqtt://pi-3:{SECRET}@broker")
    assert address.password == SECRET
    assert SECRET not in repr(address)
    assert SECRET not in str(address)
    assert SECRET not in f"{address!r:>10} {address}"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://broker", "expected mqtt://, mqtts://, ws:// or wss://, not http://"),
        ("broker:1883", "expected a URL such as mqtt://broker:1883"),
        ("", "expected a URL such as mqtt://broker.example.com"),
        ("mqtt://", "no host"),
        ("mqtt://:1883", "no host"),
        ("mqtt://broker:x", "bad port"),
        ("mqtt://broker:0", "bad port"),
        ("mqtt://broker:65536", "bad port"),
        ("mqtt://broker:-1", "bad port"),
        ("mqtt://[::1", "malformed host"),
        ("mqtt://broker/path", "takes no path, seen '/path'"),
        ("mqtt://broker?x=1", "nothing after ? or #"),
        ("ws://broker/mqtt#x", "nothing after ? or #"),
        ("mqtt://bro ker", "a space or a control character"),
        ("mqtt://broker\n", "a space or a control character"),
        ("mqtt://:s3cret@broker", "a password without a user name"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_with_what_to_change(url, expected):
    with pytest.raises(AddressError) as caught:
        Address.parse(url)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://pi-3:s3cret@broker",
        "mqtt://pi-3:s3cret@broker:x",
        "mqtt://pi-3:s3cret@",
        "mqtt://pi-3:s3cret/x@broker",
        "mqtt://pi-3:#s3cret@broker",
        "mqtt://pi-3:?s3cret@broker",
        "mqtt://pi-3:s3@cret@broker:x",
        "mqtt://pi-3:s3cret @broker",
        "mqtt://pi-3:s3cret\n@broker",
        "mqtt://pi-3:s3cret@broker/path",
        "mqtt://pi-3:s3cret@[::1",
        "mqtt://pi-3:s3cret@bro\u2100ker",
    ],
)
def test_no_error_shows_the_password(url):
    with pytest.raises(AddressError) as caught:
        Address.parse(url)
    assert "s3" not in str(caught.value)
    assert "cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_files_must_exist(tmp_path):
    with pytest.raises(AddressError, match=r"ca_file .*missing\.pem does not exist"):
        Address.parse("mqtts://broker", ca_file=tmp_path / "missing.pem")
    with pytest.raises(AddressError, match=r"ca_file .* is not a file"):
        Address.parse("mqtts://broker", ca_file=tmp_path)


def test_a_certificate_needs_its_key_and_a_key_its_certificate(tmp_path):
    pem = tmp_path / "some.pem"
    pem.touch()
    with pytest.raises(AddressError, match="cert_file without key_file"):
        Address.parse("mqtts://broker", cert_file=pem)
    with pytest.raises(AddressError, match="key_file without cert_file"):
        Address.parse("mqtts://broker", key_file=pem)
    address = Address.parse("mqtts://broker", ca_file=str(pem), cert_file=pem, key_file=pem)
    assert (address.ca_file, address.cert_file, address.key_file) == (pem, pem, pem)


@pytest.mark.parametrize(("scheme", "safe"), [("mqtt", "mqtts"), ("ws", "wss")])
def test_tls_files_with_a_scheme_without_tls_are_refused(tmp_path, scheme, safe):
    pem = tmp_path / "some.pem"
    pem.touch()
    with pytest.raises(AddressError, match=rf"ca_file given, but {scheme}:// has no TLS: use {safe}://"):
        Address.parse(f"{scheme}://broker", ca_file=pem)
