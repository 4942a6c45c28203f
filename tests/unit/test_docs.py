"""The pages and the programs say the same: links lead somewhere, quoted commands are understood, settings and files exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import msgspec
import pytest
from click.testing import CliRunner

import coordinator.cli
import coordinator.config
import edge_agent.cli
import edge_agent.config
from coordinator.config import load_settings
from midge.wire.messages import CancelReason, RefusalReason, RejectReason

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "deploy").rglob("*.md"))
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
PROGRAMS: dict[str, click.Group] = {"coordinator": coordinator.cli.main, "edge-agent": edge_agent.cli.main}
ALIASES = {"midge-coordinator": "coordinator", "midge-agent": "edge-agent"}
"""Images whose entry point is a program of ours."""
SETTINGS = {
    field.name
    for module in (coordinator.config, edge_agent.config)
    for field in msgspec.structs.fields(module.Settings)
}
REASONS = {reason for kind in (RejectReason, RefusalReason, CancelReason) for reason in get_args(kind)}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)(?:(?: {4}.*)?\n)*")
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """A page without its code."""
    return _INLINE.sub("", _INDENTED.sub("", _FENCE.sub("", TEXTS[path])))


def inline_code(path: Path) -> list[str]:
    return _INLINE.findall(_INDENTED.sub("", _FENCE.sub("", TEXTS[path])))


def code_lines(path: Path) -> Iterator[str]:
    """Each line of the page's code, joined where it ends in a backslash."""
    text = TEXTS[path]
    blocks = [body for _, body in _FENCE.findall(text)] + _INDENTED.findall(_FENCE.sub("", text))
    for block in blocks:
        yield from block.replace("\\\n", " ").splitlines()


# Links.


def anchors(path: Path) -> set[str]:
    """What a link to the page may name, as GitHub makes it of headings: in lower case, signs dropped, spaces as hyphens."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", _FENCE.sub("", TEXTS[path]), re.MULTILINE):
        text = _LINK.sub(lambda link: link[0][link[0].index("[") + 1 : link[0].index("]")], heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_every_relative_link_leads_to_a_file_and_to_a_heading_of_it(path):
    for link in _LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.is_relative_to(ROOT), f"{link}: leads out of the repository"
        assert file.exists(), f"{link}: there is no {named(file)}"
        if anchor:
            assert file in TEXTS, f"{link}: {named(file)} has no headings"
            assert anchor in anchors(file), f"{link}: {named(file)} has {', '.join(sorted(anchors(file)))}"


def test_anchors_are_as_github_makes_them(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    text = "# A *big* Title!\n\n## `name` of x-y\n\n```\n# no heading\n```\n\n## Again\n\n### Again\n\n## See [this](x.md)\n"
    monkeypatch.setitem(TEXTS, page, text)
    assert anchors(page) == {"a-big-title", "name-of-x-y", "again", "again-1", "see-this"}


def test_every_page_is_reached_from_the_readme():
    reached, queue = {ROOT / "README.md"}, [ROOT / "README.md"]
    while queue:
        path = queue.pop()
        for link in _LINK.findall(prose(path)):
            file = (path.parent / link.partition("#")[0]).resolve()
            if file in TEXTS and file not in reached:
                reached.add(file)
                queue.append(file)
    assert set(PAGES) - reached == set()


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_files_that_a_page_names_exist(path):
    kinds = "py|md|toml|yml|yaml|json|conf|service|txt"
    for code in inline_code(path):
        if re.fullmatch(rf"[\w.@-]+(/[\w.@-]+)+\.({kinds})", code) and not Path(code).name.startswith("my_"):
            assert (ROOT / code).exists() or (path.parent / code).exists(), f"`{code}`: there is no such file"


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_make_targets_that_a_page_names_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    quoted = [*inline_code(path), *(line.strip() for line in code_lines(path))]
    for line in quoted:
        match = re.match(r"(?:\w+=\S+ )*make ([a-z][\w-]*)(?: |$)", line)
        assert match is None or match[1] in targets, f"{line}: the Makefile has {', '.join(sorted(targets))}"


# Commands.


def commands() -> list[tuple[str, click.Command]]:
    return [found for program, group in PROGRAMS.items() for found in within(program, group)]


def within(path: str, group: click.Group) -> list[tuple[str, click.Command]]:
    """The commands of a group, and those of groups in it."""
    found: list[tuple[str, click.Command]] = []
    for name, command in group.commands.items():
        found.append((f"{path} {name}", command))
        if isinstance(command, click.Group):
            found += within(f"{path} {name}", command)
    return found


def understood(program: str, arguments: list[str]) -> None:
    """Parse a command line as the program would, and run nothing.

    Raises:
        click.UsageError: it would be refused.
    """
    group = PROGRAMS[program]
    if not arguments or arguments[0].startswith("-"):
        with pytest.raises(click.exceptions.Exit):
            group.make_context(program, arguments)
        return
    if arguments[0] not in group.commands:
        raise click.UsageError(f"no such command: {arguments[0]}")
    command: click.Command = group.commands[arguments[0]]
    with group.context_class(group, info_name=program) as parent:
        context = command.make_context(arguments[0], arguments[1:], parent=parent)
    while isinstance(command, click.Group) and (rest := _rest(context)):
        if rest[0] not in command.commands:
            raise click.UsageError(f"no such command: {rest[0]}")
        command = command.commands[rest[0]]
        with context:
            context = command.make_context(rest[0], rest[1:], parent=context)
    for assignment in context.params.get("assignments", ()):
        if assignment.partition("=")[0] not in SETTINGS:
            raise click.UsageError(f"--set {assignment}: no such setting")


def _rest(context: click.Context) -> list[str]:
    """What a group leaves for the command in it; older versions of click keep the command's name in public."""
    name = context._protected_args if hasattr(context, "_protected_args") else context.protected_args
    return [*name, *context.args]


def called(line: str) -> Iterator[tuple[str, list[str]]]:
    """The calls of our programs in a line of code: at its start, or behind what starts a container."""
    for part in re.split(r";|&&|\|\|", line.partition(" #")[0]):
        if "coordinator" not in part and "agent" not in part:
            continue
        try:
            words = shlex.split(part)
        except ValueError:
            continue  # a drawing
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words.pop(0)
        for index, word in enumerate(words[:-1]):
            name = word.rsplit("/", 1)[-1]
            program = ALIASES.get(name, name)
            is_first = index == 0 and re.match(r"[a-z]|--", words[1]) is not None  # and not the arrow of a drawing
            if program in PROGRAMS and (is_first or words[index + 1] in PROGRAMS[program].commands):
                yield program, words[index + 1 :]
                break


def quoted_calls() -> list[tuple[str, str, list[str]]]:
    return [
        (named(path), program, arguments)
        for path in PAGES
        for line in code_lines(path)
        for program, arguments in called(line.strip())
    ]


@pytest.mark.parametrize(
    "arguments", [["coordinator"], ["coordinator", "models"], ["coordinator", "round"], ["edge-agent"]], ids=" ".join
)
def test_a_list_of_commands_cuts_no_summary_at_80_columns(arguments):
    shown = CliRunner().invoke(PROGRAMS[arguments[0]], [*arguments[1:], "--help"], terminal_width=80).output
    assert "Commands:" in shown
    assert "..." not in shown.partition("Commands:")[2]


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_has_help_with_an_example_that_it_understands(name, command):
    program = name.split()[0]
    with click.Context(command, info_name=name) as context:
        text = command.get_help(context)
    assert command.help
    assert command.get_short_help_str()
    _, _, examples = text.partition("Examples:")
    lines = [line.strip() for line in examples.splitlines() if line.strip().startswith(f"{name}")]
    assert lines, f"{name} --help shows no example"
    for line in lines:
        (call,) = called(line)
        assert call[0] == program
        understood(*call)


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_option_says_what_it_is(name, command):
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]}"


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_command_is_in_the_readme_or_the_docs(name):
    pages = [path for path in PAGES if path.name == "README.md" or path.is_relative_to(ROOT / "docs")]
    in_code = [line for path in pages for line in [*code_lines(path), *inline_code(path)]]
    pattern = re.compile(rf"(^|[\s/]){name.replace(' ', ' +')}(\s|;|$)")
    assert any(pattern.search(line) for line in in_code), f"no page shows {name}"


@pytest.mark.parametrize(
    ("page", "program", "arguments"),
    quoted_calls(),
    ids=lambda value: value if isinstance(value, str) else shlex.join(value),
)
def test_every_quoted_command_line_is_understood(page, program, arguments):
    try:
        understood(program, arguments)
    except click.UsageError as error:
        pytest.fail(f"{page}: {program} {shlex.join(arguments)}: {error.format_message()}")


def test_command_lines_within_sentences_are_understood_as_far_as_they_go():
    for path in PAGES:
        for code in inline_code(path):
            for program, arguments in called(code):
                try:
                    understood(program, arguments)
                except click.MissingParameter:
                    pass  # only the command is named
                except click.UsageError as error:
                    pytest.fail(f"{named(path)}: `{code}`: {error.format_message()}")


def test_the_pages_quote_commands_at_all():
    calls = quoted_calls()
    assert len(calls) >= 10
    assert {program for _, program, _ in calls} == set(PROGRAMS)
    with pytest.raises(click.UsageError):
        understood("coordinator", ["run", "--no-such-option"])
    with pytest.raises(click.UsageError):
        understood("coordinator", ["run", "--set", "no_such_setting=1"])
    line = "docker-compose exec coordinator coordinator runs --json; X=1 /opt/bin/edge-agent doctor  # why"
    assert list(called(line)) == [("coordinator", ["runs", "--json"]), ("edge-agent", ["doctor"])]


# Settings.


@pytest.mark.parametrize(
    "path", [ROOT / "docs" / "operations.md", *(p for p in PAGES if p.name == "README.md")], ids=named
)
def test_settings_that_a_page_names_exist(path):
    for code in inline_code(path):
        match = re.fullmatch(r"([a-z]+(?:_[a-z0-9]+)+)(?: = .+)?", code)
        if match is not None and not match[1].startswith("midge_") and match[1] not in REASONS:
            assert match[1] in SETTINGS, f"`{code}`: no such setting"


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_variables_of_the_environment_that_a_page_names_exist(path):
    known = {f"MIDGE_{key.upper()}" for key in SETTINGS} | {"MIDGE_CONFIG", "MIDGE_FAIL_POINT"}
    shown_wrong = "".join(body for kind, body in _FENCE.findall(TEXTS[path]) if kind == "text")
    for name in set(re.findall(r"\bMIDGE_[A-Z_]+\b", TEXTS[path])) - set(re.findall(r"\bMIDGE_[A-Z_]+\b", shown_wrong)):
        assert name in known, f"{name}: no such setting"


def test_the_examples_of_configuration_files_are_accepted_and_equal(tmp_path):
    blocks = dict(_FENCE.findall(TEXTS[ROOT / "docs" / "configuration.md"]))
    loaded = []
    for kind in ("toml", "json"):
        file = tmp_path / f"midge.{kind}"
        file.write_text(blocks[kind])
        loaded.append(load_settings(file=file, environ={}))
    assert loaded[0] == loaded[1]
    assert tomllib.loads(blocks["toml"])["rounds"] == loaded[0].rounds


# The changelog.


def test_the_changelog_says_what_is_not_released_yet():
    text = TEXTS[ROOT / "CHANGELOG.md"]
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    first = text.split("## [Unreleased]", 1)[1].split("\n## ", 1)[0]
    kinds = re.findall(r"^### (.+)$", first, re.MULTILINE)
    assert kinds
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert re.search(r"^- \S", first, re.MULTILINE)


def test_every_test_that_the_page_on_correctness_names_is_there():
    page = ROOT / "docs" / "correctness.md"
    cells = re.findall(r"\[test_\w+\]\(([^)]+)\) ((?:`test_\w+`(?:, )?)+)", TEXTS[page])
    assert len(cells) >= 9
    for link, names in cells:
        source = (page.parent / link).read_text(encoding="utf-8")
        for name in re.findall(r"test_\w+", names):
            assert f"def {name}(" in source, f"{name} is not in {link}"
