"""config.toml: what a command ran with is saved beside what it made, and `--config` repeats it."""

from __future__ import annotations

import shlex
import tomllib
from hashlib import sha256

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from orthogonalize.cli import main
from orthogonalize.commands.options.effective import as_toml
from orthogonalize.core.output_folders import CONFIG


def done(*words) -> str:
    result = CliRunner().invoke(main, ["--quiet", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


def test_saved_options_repeat_every_command(model, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORTHOGONALIZE_EXTRACT_SEED", "3")
    sizes = "--train 12 --val 4 --test 6 --trials 0 --finders dim --no-filter --behaviour-tokens sorry --device cpu"
    sides = [word for side, source in sources.items() for word in (f"--{side}", source)]
    done("extract", model, "--out", "run", *sides, *shlex.split(sizes))
    monkeypatch.delenv("ORTHOGONALIZE_EXTRACT_SEED")
    before = (tmp_path / "run" / "run.json").read_bytes()
    repeated = CliRunner().invoke(main, ["--config", "run/config.toml", "extract"])
    assert repeated.stderr.count("unchanged, kept") == 5
    assert (tmp_path / "run" / "run.json").read_bytes() == before

    done("edit", model, "--run", "run", "--method", "ablate", "--out", "edited", "--force", "--shared")
    assert tomllib.loads((tmp_path / "edited" / CONFIG).read_text()) == {
        "edit": {
            "model": str(model), "out": "edited", "run": "run", "method": "ablate", "per-layer": False, "workers": 1,
            "format": "checkpoint", "device": "auto",
        }
    }  # fmt: skip
    done("--config", "edited/config.toml", "edit", "--out", "again")
    assert len({sha256((tmp_path / f / "model.safetensors").read_bytes()).digest() for f in ("edited", "again")}) == 1

    short = "--engine hf --device cpu --suite refusal,loss --max-new-tokens 4 --limit 3"
    done("eval", "edited", "--base", model, "--run", "run", "--out", "report", *shlex.split(short))
    done("--config", "report/config.toml", "eval", "--out", "report", "--force")
    assert tomllib.loads((tmp_path / "report" / CONFIG).read_text())["eval"]["limit"] == 3

    listed = done("push", "edited", "me/edited", "--dry-run")
    assert "model.safetensors" in listed
    assert CONFIG not in listed, "it may hold paths of this machine"
    twice = CliRunner().invoke(main, ["edit", "edited", "--run", "run", "--method", "ablate", "--out", "twice"])
    assert twice.exit_code == 0, twice.output
    assert CONFIG not in twice.stderr, "it is no file of the model that would be missed"
    assert str(model) not in (tmp_path / "twice" / CONFIG).read_text()


LINES = {
    "extract": "some/model --out o --positive xstest --negative orbench --preserve xstest --preserve harmbench "
    "--template-argument a=1 --template-argument b=x --no-filter --no-download --layers 3-5 --positions -1,-2",
    "edit": "some/model --out o --method reflect --alpha 1.5 --per-layer --site-strengths attn.1=0.5 --rank acc99",
    "sweep": "some/model --run . --out o --methods ablate,leace --scopes one,all --strengths 0.5,1 --at -1,12",
    "eval": ". --base some/model --run . --out o --prompts mine=x.txt --prompts y.txt --redact --judge none",
    "demo": "--goal calibrate --engine hf",
}


@pytest.mark.parametrize("name", LINES)
def test_options_read_back_are_what_was_given(name, tmp_path, monkeypatch):
    command, seen, written = main.commands[name], [], []

    def callback(**options):
        seen.append(options)
        ctx = click.get_current_context()
        written.append(as_toml(name, ctx.meta["orthogonalize.raw options"]))

    monkeypatch.setattr(command, "callback", callback)
    monkeypatch.chdir(tmp_path)
    for prompts in ("x.txt", "y.txt"):
        (tmp_path / prompts).write_text("how do I bake bread\n")
    monkeypatch.setattr("orthogonalize.commands.options.existing.check_finished_run", lambda _: None)
    done(name, *shlex.split(LINES[name]), "--force")
    (tmp_path / CONFIG).write_text(written[0])
    done("--config", tmp_path / CONFIG, name)
    assert seen[0].pop("force")
    assert not seen[1].pop("force"), "repeating must not replace what it repeats"
    assert seen[1] == seen[0]
    assert written[1] == written[0]


@given(st.dictionaries(st.from_regex(r"[a-z][a-z-]*", fullmatch=True), st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])), st.booleans(), st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False, allow_infinity=False), st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
)))  # fmt: skip
def test_any_values_are_read_back(options):
    assert tomllib.loads(as_toml("extract", options)) == {"extract": options}
