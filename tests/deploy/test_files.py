"""What can be said of the deployment's files without an engine: they fit each other, and what they name exists."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordinator.config import Settings as CoordinatorSettings
from coordinator.config import load_settings as load_coordinator
from edge_agent import cli
from edge_agent.config import Settings as AgentSettings
from edge_agent.config import load_settings as load_agent
from tests.deploy.stack import AGENTS, FEDERATION, OURS, ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
GRAFANA = ROOT / "deploy" / "grafana"


def substitute(text: str, **values: str) -> str:
    """Compose's own substitution, of `${NAME:-default}` and `${NAME-default}`."""
    return re.sub(r"\$\{(\w+):?-([^}]*)\}", lambda match: values.get(match[1], match[2]), text)


def mounts(service: str) -> Iterator[tuple[str, str, str]]:
    """Source, target and mode of each volume."""
    for volume in SERVICES[service].get("volumes", ()):
        source, target, *mode = volume.split(":")
        yield source, target, *(mode or ["rw"])


def coordinator_settings() -> CoordinatorSettings:
    environ = {key: substitute(value) for key, value in SERVICES["coordinator"]["environment"].items()}
    return load_coordinator(file=ROOT / "deploy" / "coordinator.toml", environ=environ)


def agent_settings(service: str) -> AgentSettings:
    """What the agent makes of its command and its environment."""
    command, *arguments = SERVICES[service]["command"]
    context = cli.main.commands[command].make_context(command, list(arguments))
    options = {key: value for key, value in context.params.items() if key in AgentSettings.__struct_fields__}
    given = {key: value for key, value in options.items() if value not in (None, ())}
    return load_agent(environ=SERVICES[service]["environment"], options=given)


def stages() -> dict[str, str]:
    """The Dockerfile's stages by name."""
    return {part.split(maxsplit=3)[2]: part for part in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]}


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_comes_back_and_bounds_its_log(service: str) -> None:
    assert SERVICES[service]["restart"] == "unless-stopped"
    assert set(SERVICES[service]["logging"]["options"]) == {"max-size", "max-file"}


@pytest.mark.parametrize("service", SERVICES)
def test_ports_are_published_to_this_machine_alone_unless_said_otherwise(service: str) -> None:
    for port in SERVICES[service].get("ports", ()):
        assert substitute(port).startswith("127.0.0.1:")
        assert substitute(port, BIND_ADDRESS="0.0.0.0").startswith("0.0.0.0:")  # noqa: S104


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_mounted_exists_here_and_cannot_be_changed_from_inside(service: str) -> None:
    for source, _, mode in mounts(service):
        if source.startswith("./"):
            assert (ROOT / source).exists(), source
            assert mode == "ro", source
        else:
            assert source in COMPOSE["volumes"], source


@pytest.mark.parametrize("service", sorted(set(SERVICES) - set(OURS)))
def test_images_of_others_are_pinned_and_have_a_health_check(service: str) -> None:
    assert re.search(r":v?\d+\.\d+", SERVICES[service]["image"]), SERVICES[service]["image"]
    assert SERVICES[service]["healthcheck"]["test"][0] == "CMD"


def test_grafana_finds_its_data_source_and_dashboard_where_provisioning_says() -> None:
    mounted = {target: ROOT / source for source, target, _ in mounts("grafana")}
    for kind in ("datasources", "dashboards"):
        folder = mounted[f"/etc/grafana/provisioning/{kind}"]
        assert folder == GRAFANA / "provisioning" / kind
        assert list(folder.glob("*.yml"))
    provider = yaml.safe_load((GRAFANA / "provisioning/dashboards/midge.yml").read_text(encoding="utf-8"))
    dashboards = mounted[provider["providers"][0]["options"]["path"]]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (dashboards / home.name).is_file()
    source = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text(encoding="utf-8"))
    assert source["datasources"][0]["url"] == "http://prometheus:9090"


def test_prometheus_asks_the_coordinator_where_it_serves() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    settings = coordinator_settings()
    assert config["scrape_configs"][0]["static_configs"][0]["targets"] == [f"coordinator:{settings.http_port}"]
    assert settings.http_host == "0.0.0.0"  # noqa: S104  of the container


def test_coordinator_and_agents_are_of_one_federation_at_one_broker() -> None:
    ours = coordinator_settings()
    assert ours.federation == FEDERATION
    for agent in map(agent_settings, AGENTS):
        assert (agent.broker, agent.federation, agent.task) == (ours.broker, ours.federation, ours.task)
    assert all(SERVICES[name]["depends_on"] == {"mosquitto": {"condition": "service_healthy"}} for name in OURS)


def test_each_digit_belongs_to_one_agent_and_the_others_have_one_in_twenty() -> None:
    agents = [agent_settings(name) for name in AGENTS]
    assert [agent.agent_id for agent in agents] == list(AGENTS)
    assert [agent.classes for agent in agents] == [(1, 2, 3), (4, 5, 6), (7, 8, 9, 0)]
    assert {(agent.sel_prob, agent.def_prob) for agent in agents} == {(1.0, 0.05)}


def test_a_run_goes_on_while_one_agent_is_away() -> None:
    settings = coordinator_settings()
    assert settings.min_agents == settings.needed_updates == len(AGENTS) - 1


def test_both_images_run_as_a_numbered_user_and_have_a_health_check() -> None:
    for target in ("agent", "coordinator"):
        assert re.search(r"^USER [1-9]\d*$", stages()[target], re.MULTILINE)
        assert re.search(r"^HEALTHCHECK ", stages()[target], re.MULTILINE)
        assert target in {SERVICES[service]["build"]["target"] for service in OURS}


def test_the_classic_builder_can_read_the_dockerfile() -> None:
    assert not re.search(r"^RUN --|<<", DOCKERFILE, re.MULTILINE)
    assert not DOCKERFILE.startswith("# syntax")


def test_what_the_dockerfile_copies_is_in_the_build_context() -> None:
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert "midge" in copied
    for source in copied:
        assert any(source == path or source.startswith(f"{path}/") for path in allowed), f".dockerignore hides {source}"
        assert (ROOT / source).exists(), source
