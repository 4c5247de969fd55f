"""Help pages: every option stands in one group, and every command has two examples that click's own parser takes."""

from __future__ import annotations

import shlex

import click
import pytest
from click.testing import CliRunner

from orthogonalize.cli import main
from orthogonalize.commands.options.existing import Named
from orthogonalize.commands.options.pages import OTHERS, PAGES

COMMANDS = list(main.commands)


def page(name: str) -> str:
    shown = CliRunner().invoke(main, [name, "--help"], terminal_width=100)
    assert shown.exit_code == 0, shown.output
    return shown.output


def test_every_command_has_a_page_and_no_other():
    assert PAGES.keys() == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_in_one_group(name):
    command = main.commands[name]
    groups = command.option_groups(click.Context(command))
    placed = [option.opts[-1] for options in groups.values() for option in options]
    known = [each.opts[-1] for each in command.params if isinstance(each, click.Option)]
    assert sorted(placed) == sorted([*known, "--help"])
    assert [each.opts[-1] for each in groups[OTHERS]] == ["--help"], "every other option has a group of its own"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_shows_the_groups_and_the_examples_whole(name):
    lines = page(name).splitlines()
    assert [line for line in lines if line.rstrip(":") in PAGES[name].groups] == [f"{t}:" for t in PAGES[name].groups]
    at = lines.index("Examples:")
    assert lines[at + 1 : at + 3] == [f"  {example}" for example in PAGES[name].examples]


@pytest.mark.parametrize("name", COMMANDS)
def test_two_examples_are_what_the_parser_takes(name):
    assert len(set(PAGES[name].examples)) == 2
    for example in PAGES[name].examples:
        program, called, *words = shlex.split(example)
        assert (program, called) == ("orthogonalize", name)
        command = main.commands[name]
        context = click.Context(command, info_name=name)
        values, rest, _ = command.make_parser(context).parse_args(list(words))
        assert rest == []
        for parameter in command.get_params(context):
            value = values.get(parameter.name)
            assert value is not None or not parameter.required, f"{example} lacks {parameter.name}"
            if value is not None and not isinstance(parameter.type, Named | click.Path):  # of files that are not there
                for each in value if parameter.multiple else [value]:
                    parameter.type.convert(each, parameter, context)


@pytest.mark.parametrize("wrong", ["orthogonalize compare one two --no-such", "orthogonalize compare one two three"])
def test_the_parser_would_refuse_another_example(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("one", "two"):
        (tmp_path / file).touch()
    command = main.commands["compare"]
    context = click.Context(command)
    words = shlex.split(wrong)[2:]
    with pytest.raises(click.UsageError):
        command.parse_args(context, words)
