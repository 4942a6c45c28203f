"""A whole federation over TLS with passwords, and what is said where one of the two is wrong. No password is ever shown."""

from __future__ import annotations

import shutil
import subprocess

import psutil
import pytest

from tests.broker import tasks
from tests.broker.federation import assert_same_model, call, federated, wait_until
from tests.broker.test_restart import BATCHES, digests, into_the_middle_of, undisturbed
from tests.broker.test_transport_security import KEY, make_signed, openssl

PASSWORD = "correct-horse-battery-staple"
WRONG = "wrong-horse-battery-staple"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """ca.crt signed server.crt for 127.0.0.1; other.crt signed nothing here."""
    directory = tmp_path_factory.mktemp("certificates")
    for name in ("ca", "other"):
        files = ["-keyout", f"{name}.key", "-out", f"{name}.crt"]
        openssl(directory, "req", "-x509", *KEY, "-subj", f"/CN={name}", *files)
    make_signed(directory, "server", "ca", "subjectAltName=IP:127.0.0.1")
    return directory


@pytest.fixture
def secrets(tmp_path):
    """Files with the right and with a wrong password."""
    directory = tmp_path / "secrets"
    directory.mkdir()
    for name, password in (("right", PASSWORD), ("wrong", WRONG)):
        (directory / name).write_text(password + "\n")
    return directory


@pytest.fixture
def url(start_mosquitto, certificates, secrets, free_port):
    """A broker that speaks TLS and asks for a password."""
    passwords = secrets / "mosquitto"
    for number, user in enumerate(("coordinator", "agent-0", "agent-1")):
        create = ["-c"] if number == 0 else []
        subprocess.run(["mosquitto_passwd", "-b", *create, passwords, user, PASSWORD], check=True, capture_output=True)
    tls = [f"{key} {certificates / name}" for key, name in (("certfile", "server.crt"), ("keyfile", "server.key"))]
    start_mosquitto(f"listener {free_port} 127.0.0.1", *tls, "allow_anonymous false", f"password_file {passwords}")
    return f"mqtts://127.0.0.1:{free_port}"


def login(secrets, user: str, file: str = "right") -> list[str]:
    return ["--username", user, "--password-file", str(secrets / file)]


def test_a_federation_over_tls_with_passwords_learns_and_shows_no_password(
    url, make_federation, certificates, secrets, tmp_path
):
    federation = make_federation(url, security=["--ca-file", str(certificates / "ca.crt")])
    options = {"log_level": "debug"}
    federation.hold("agent-1", training=2)
    for part in range(2):
        federation.start_agent(f"agent-{part}", *login(secrets, f"agent-{part}"), part=part, **options)
    coordinator = federation.start_coordinator(
        *login(secrets, "coordinator"), rounds=2, min_agents=2, batch_size=0, **options
    )
    federation.wait_for_training("agent-1", 2)
    everyone = [psutil.Process(program.pid) for program in federation.programs]
    everyone += [child for program in federation.programs for child in program.children()]
    assert len(everyone) >= 2 * 2 + 1
    for process in everyone:  # what `ps` shows of them
        assert PASSWORD not in " ".join(process.cmdline())
    assert PASSWORD not in federation.get("/api/v1/status")[1] + federation.get("/metrics")[1]
    federation.release("agent-1")
    assert coordinator.wait() == 0
    assert_same_model(federation.model(2), federated(tasks.linear, {"agent-0": 0, "agent-1": 1}, 2)[2])
    for path in (tmp_path / federation.name).rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path


@pytest.mark.fault(33)
def test_whom_the_broker_cannot_be_trusted_by_waits_and_says_which_file_to_give(
    url, make_federation, certificates, secrets
):
    federation = make_federation(url, security=["--ca-file", str(certificates / "other.crt")])
    agent = federation.start_agent("agent-0", *login(secrets, "agent-0"))
    coordinator = federation.start_coordinator(*login(secrets, "coordinator"), min_agents=1)
    for program in (agent, coordinator):
        program.wait_for_log("the broker's certificate is not trusted")
        assert "give the certificate of the CA that signed it (ca_file)" in program.log()
    status, text = wait_until(
        lambda: federation.get("/readyz") if "trusted" in federation.get("/readyz")[1] else None, "/readyz says why"
    )
    assert status == 503
    assert "the broker cannot be reached: " in text
    assert federation.get("/healthz") == (200, '{"status":"ok"}')
    assert agent.is_running
    assert coordinator.stop() == 0
    assert PASSWORD not in agent.log() + coordinator.log()


def test_a_wrong_password_is_named_with_its_user_and_never_shown(url, make_federation, certificates, secrets):
    federation = make_federation(url, security=["--ca-file", str(certificates / "ca.crt")])
    agent = federation.start_agent("agent-0", *login(secrets, "agent-0", "wrong"), log_level="debug")
    agent.wait_for_log("not authorised as user 'agent-0': check user name, password")
    assert agent.is_running
    assert WRONG not in agent.log()


@pytest.mark.parametrize(("module", "command"), [("coordinator", "run"), ("edge_agent", "run")])
def test_help_shows_no_password_of_the_environment(module, command):
    shown = call(module, command, "--help", MIDGE_PASSWORD=PASSWORD)
    assert shown.returncode == 0
    assert "--password-file" in shown.stdout
    assert PASSWORD not in shown.stdout + shown.stderr


@pytest.mark.parametrize("module", ["coordinator", "edge_agent"])
def test_a_mistake_beside_a_password_does_not_show_it(module):
    shown = call(
        module, "run", "--set", f"pasword={PASSWORD}", "--broker", f"mqtt://me:{PASSWORD}@", MIDGE_PASSWORD=WRONG
    )
    assert shown.returncode == 2
    assert "did you mean password" in shown.stderr.lower().replace("'", "").replace("`", "")
    assert PASSWORD not in shown.stdout + shown.stderr
    assert WRONG not in shown.stdout + shown.stderr


@pytest.fixture
def swappable(start_mosquitto, certificates, tmp_path, free_port):
    """A broker whose certificate can be swapped: it is started again with that one of the directory of certificates."""
    own = tmp_path / "own"
    own.mkdir()

    def put(name: str) -> None:
        for end in ("crt", "key"):
            shutil.copy(certificates / f"{name}.{end}", own / f"broker.{end}")

    put("server")
    files = [f"certfile {own}/broker.crt", f"keyfile {own}/broker.key"]
    broker = start_mosquitto(f"listener {free_port} 127.0.0.1", *files)

    def swap(name: str) -> None:
        broker.kill()
        put(name)
        broker.start()

    return f"mqtts://127.0.0.1:{free_port}", swap


@pytest.mark.long
@pytest.mark.fault(33)
@pytest.mark.parametrize(
    ("name", "words"),
    [("expired", "certificate has expired"), ("foreign", "unable to get local issuer certificate")],
)
def test_a_certificate_that_is_swapped_for_a_bad_one_stops_everyone_until_it_is_mended(
    name, words, swappable, make_federation, certificates, recovery, tmp_path
):
    url, swap = swappable
    for bad, authority, days in (("expired", "ca", -1), ("foreign", "other", 30)):
        if not (certificates / f"{bad}.crt").exists():
            make_signed(certificates, bad, authority, "subjectAltName=IP:127.0.0.1", days)
    federation = make_federation(url, security=["--ca-file", str(certificates / "ca.crt")])
    federation.hold("agent-1", training=2)
    federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=3, min_agents=2, **BATCHES)
    into_the_middle_of(federation, 2, coordinator)
    swap(name)
    for program in federation.programs:
        program.wait_for_log(f"the broker's certificate is not trusted: {words}")
    federation.release("agent-1")
    wait_until(lambda: words in federation.get("/readyz")[1], "/readyz says why")
    assert federation.get("/readyz")[0] == 503
    for program in federation.programs:
        assert program.log().count("broker connected") == 1  # nobody spoke to it
    assert len(federation.versions()) == 2
    swap("server")
    with recovery.watch():
        federation.wait_for_round(2)
    recovery.lost(len({"agent-0"} - federation.updates(2).keys()))
    assert coordinator.wait() == 0
    assert digests(federation) == undisturbed(tmp_path / "undisturbed", 2, 3)[1]
