"""Options from a TOML file and from environment variables, below those of the command line."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from orthogonalize.cli import main
from orthogonalize.commands.options.config_file import read_config
from orthogonalize.core.errors import OrthogonalizeError


@pytest.fixture
def seen(monkeypatch):
    """The options that `extract` gets, instead of running it."""
    found: dict = {}
    monkeypatch.setattr(main.commands["extract"], "callback", lambda **options: found.update(options))
    return found


def run(*words: str, **environment: str) -> str:
    result = CliRunner().invoke(main, list(words), env=environment)
    assert result.exit_code == 0, result.output
    return result.output


WORDS = ("extract", "some/model", "--out", "o")


def test_file_sets_options_and_the_command_line_wins(seen, tmp_path):
    file = tmp_path / "o.toml"
    file.write_text('[extract]\ntrain = 7\nfinders = ["dim", "leace"]\nsensitive = true\nmax_rank = 9\n')
    run("--config", str(file), *WORDS)
    assert (seen["train"], seen["finders"], seen["sensitive"], seen["max_rank"]) == (7, ["dim", "leace"], True, 9)
    run("--config", str(file), *WORDS, "--train", "8")
    assert seen["train"] == 8


def test_negated_and_repeatable_options_mean_what_they_mean_on_the_command_line(seen, tmp_path):
    file = tmp_path / "o.toml"
    file.write_text(
        '[extract]\nout = "run"\nno-filter = true\nno-download = true\ntemplate-argument = ["a=1", "b=x"]\n'
    )
    run("--config", str(file), "extract", "some/model")
    assert (seen["filtered"], seen["download"], seen["template_arguments"]) == (False, False, {"a": 1, "b": "x"})


def test_environment_is_between_file_and_command_line(seen, tmp_path):
    file = tmp_path / "o.toml"
    file.write_text("[extract]\ntrain = 7\n")
    run("--config", str(file), *WORDS, ORTHOGONALIZE_EXTRACT_TRAIN="9")
    assert seen["train"] == 9
    run("--config", str(file), *WORDS, "--train", "8", ORTHOGONALIZE_EXTRACT_TRAIN="9")
    assert seen["train"] == 8


def test_variables_are_named_after_options_not_after_what_functions_call_them(seen):
    run(*WORDS, ORTHOGONALIZE_EXTRACT_JSON="1", ORTHOGONALIZE_EXTRACT_NO_FILTER="1", ORTHOGONALIZE_EXTRACT_SPLIT="dev")
    assert (seen["as_json"], seen["filtered"], seen["hub_split"]) == (True, False, "dev")
    run(*WORDS, ORTHOGONALIZE_EXTRACT_NO_DOWNLOAD="1", ORTHOGONALIZE_EXTRACT_TEMPLATE_ARGUMENT="a=1 b=x")
    assert (seen["download"], seen["template_arguments"]) == (False, {"a": 1, "b": "x"})
    run(*WORDS)
    assert (seen["as_json"], seen["filtered"], seen["hub_split"], seen["download"]) == (False, True, "train", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[eval]\nno-such = 1\n", "eval has no option --no-such"),
        ("[nothing]\n", "there is no command 'nothing'"),
        ("limit = 1\n", "there is no command 'limit'"),
        ("[eval\n", "cannot be read as TOML"),
    ],
)
def test_what_a_file_cannot_mean_is_refused(text, message, tmp_path):
    (tmp_path / "o.toml").write_text(text)
    with pytest.raises(OrthogonalizeError, match=message):
        read_config(tmp_path / "o.toml", main)


def test_every_option_can_be_named_in_a_file(tmp_path):
    for name, command in main.commands.items():
        for option in command.params:
            if isinstance(option, click.Option):
                key = option.opts[-1].removeprefix("--")
                (tmp_path / "o.toml").write_text(f'[{name}]\n"{key}" = "x"\n')
                assert read_config(tmp_path / "o.toml", main) == {name: {option.name: "x"}}
