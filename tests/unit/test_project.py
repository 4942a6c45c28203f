"""What `coordinator new` writes: where, under which names, and that it is in the wheel and fits our images."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import coordinator.config
import edge_agent.config
from coordinator.project import ProjectError, check_name, create, templates, write_project

ROOT = Path(__file__).parents[2]
FILES = [
    ".gitignore",
    "README.md",
    "agent.toml",
    "docker-compose.yml",
    "flowers.py",
    "midge.toml",
    "pytest.ini",
    "test_flowers.py",
]


@pytest.fixture
def project(tmp_path):
    write_project("flowers", tmp_path / "deep" / "garden")
    return tmp_path / "deep" / "garden"


def test_everything_carries_the_project_s_name(project):
    assert sorted(path.name for path in project.iterdir()) == FILES
    for path in project.iterdir():
        assert "my_project" not in path.read_text(), path
        assert path.stat().st_mode & 0o111 == 0
    assert len(list(templates())) == len(FILES)


def test_the_settings_of_both_sides_are_accepted_and_meet(project):
    of_coordinator = coordinator.config.load_settings(file=project / "midge.toml", environ={})
    of_agent = edge_agent.config.load_settings(file=project / "agent.toml", environ={}, options={"agent_id": "a"})
    for key in ("broker", "federation", "task"):
        assert getattr(of_coordinator, key) == getattr(of_agent, key), key
    assert (of_coordinator.federation, of_coordinator.task) == ("flowers", "./flowers.py")
    assert of_agent.of == of_coordinator.min_agents == 2


def test_nothing_is_overwritten(project, capsys):
    before = {path.name: path.read_text() for path in project.iterdir()}
    assert create("flowers", project) == 2
    assert "is there already: nothing was written; choose another --dir" in " ".join(capsys.readouterr().err.split())
    assert {path.name: path.read_text() for path in project.iterdir()} == before
    (project / "flowers.py").unlink()
    with pytest.raises(ProjectError):
        write_project("flowers", project / "README.md")
    with pytest.raises(ProjectError, match="Not a directory"):
        write_project("flowers", project / "README.md" / "inner")


def test_an_empty_directory_is_taken_and_the_name_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowers").mkdir()
    assert create("flowers", None) == 0
    assert sorted(path.name for path in (tmp_path / "flowers").iterdir()) == FILES
    assert "next: cd flowers && python -m pytest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("My-Flowers", "did you mean my_flowers?"),
        ("9lives", "starting with a letter"),
        ("", "starting with a letter"),
        ("../up", "did you mean up?"),
        ("x" * 41, "did you mean " + "x" * 40),
        ("class", "choose another, such as my_class"),
        ("random", "choose another, such as my_random"),
        ("numpy", "choose another, such as my_numpy"),
        ("coordinator", "choose another"),
    ],
)
def test_a_name_that_would_not_do_is_refused_with_one_that_would(name, words, tmp_path):
    with pytest.raises(ProjectError) as refused:
        write_project(name, tmp_path / "new")
    assert words in str(refused.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["flowers", "a", "my_project", "cnn2"])
def test_other_names_will_do(name):
    check_name(name)


def services(path: Path) -> dict:
    return yaml.safe_load(path.read_text())["services"]


def test_the_compose_file_uses_the_images_of_ours_in_their_way(project):
    made, ours = services(project / "docker-compose.yml"), services(ROOT / "docker-compose.yml")
    assert set(made) == {"mosquitto", "coordinator", "agent-1", "agent-2"}
    for name, service in made.items():
        assert service["image"] == ours[name]["image"]
        if name != "mosquitto":
            for key in ("read_only", "tmpfs", "cap_drop", "security_opt", "stop_grace_period"):
                assert service[key] == ours[name][key], f"{name}: {key}"
            assert any(volume.endswith(":/var/lib/midge") for volume in service["volumes"])
            assert f".:{service['working_dir']}:ro" in service["volumes"]
    of_agents = [made[name]["command"] for name in ("agent-1", "agent-2")]
    assert [command[command.index("--index") + 1] for command in of_agents] == ["0", "1"]


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
def test_compose_understands_the_file(project):
    done = subprocess.run(["docker-compose", "config", "-q"], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_s_data_are_all_the_templates():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["coordinator"]
    named = {path for pattern in data for path in (ROOT / "coordinator").glob(pattern) if path.is_file()}
    assert {
        path for path in (ROOT / "coordinator" / "templates").rglob("*") if "__pycache__" not in path.parts
    } - named == {ROOT / "coordinator" / "templates" / "project"}


def test_the_templates_are_in_the_wheel(tmp_path):
    pytest.importorskip("setuptools", minversion="77")  # what builds it; elsewhere pip would have to fetch it
    # Of a copy with as little as a wheel needs: building writes beside its sources.
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"][
        "include"
    ]:
        name = package.rstrip("*")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {
        f"coordinator/templates/project/{path.name}" for path in (ROOT / "coordinator/templates/project").glob("*.*")
    } <= inside
    assert "coordinator/templates/project/gitignore" in inside
