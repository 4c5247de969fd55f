"""The command line: the group of all commands, its global options and how errors are told.

Each command is a thin layer over the function of the same name; these layers are in `commands/command_line/`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .commands._console import quieten_libraries, write_what_streams_can
from .commands.command_line import (
    checking,
    demonstrating,
    editing,
    finding,
    machine,
    measuring,
    plotting,
    sharing,
    talking,
)
from .commands.command_line.debugging import debug_log
from .commands.options.common import path
from .commands.options.config_file import read_config
from .commands.options.environment import name_variables
from .core import interrupts, progress
from .core.errors import OrthogonalizeError, ran_out_of_memory, shown
from .core.registry import load_plugins

RESUME = "no partial output was left behind. Re-run the command to resume."
PREFIX = "ORTHOGONALIZE"  # of environment variables
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "auto_envvar_prefix": PREFIX}


class Commands(click.Group):
    """The group of all commands, which turns errors into one line and an exit status.

    The status is 1 for errors that the user can fix, and 130 for Ctrl-C and SIGTERM. With --debug, errors keep their
    traceback, here and in a log file.
    """

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.params.get("debug"):
            progress.show(not ctx.params["quiet"])
            with debug_log(sys.argv), interrupts.handle_signals():
                return super().invoke(ctx)
        try:
            with interrupts.handle_signals():
                return super().invoke(ctx)
        except OrthogonalizeError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except OSError as error:
            click.echo(f"error: {shown(error.filename or 'the system')}: {shown(error.strerror or error)}", err=True)
            ctx.exit(1)
        except (MemoryError, RuntimeError) as error:
            message = ran_out_of_memory(error)
            if message is None:
                raise
            advice = "free some memory, or choose another --device if the command has one"
            click.echo(f"error: {' '.join(message.split())}; {advice}; {RESUME}", err=True)
            ctx.exit(1)
        except (KeyboardInterrupt, click.Abort):
            click.echo(f"interrupted; {RESUME}", err=True)
            ctx.exit(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="orthogonalize")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars or notes.")
@click.option("--verbose", "-v", is_flag=True, help="Show what transformers and vLLM log.")
@click.option(
    "--debug", is_flag=True, help="Show the traceback of an error, and write a log file here; implies --verbose."
)
@click.option("--config", type=path(), metavar="FILE", help="TOML file of options: a table for each command.")
@click.pass_context
def main(context: click.Context, quiet: bool, verbose: bool, debug: bool, config: Path | None) -> None:
    """Edit a concept out of, or into, a language model's weights, and prove it.

    The usual order is extract, edit, eval, push. MODEL is a checkpoint folder, a Hub id or a .gguf
    file. A prompt source is a .txt, .json, .jsonl, .csv or .parquet file, or a Hub dataset.
    """
    write_what_streams_can()
    progress.show(not quiet)
    load_plugins()
    if config is not None:
        context.default_map = read_config(config, main)
    if not (verbose or debug):
        # The Hub's client sees inside a file that it uploads; elsewhere than on a terminal, ours writes lines.
        quieten_libraries(bars=context.invoked_subcommand == "push" and not quiet and sys.stderr.isatty())


for _command in (  # in the order of the help
    finding.extract, editing.edit, measuring.eval_, talking.chat, sharing.push, checking.verify, measuring.sweep,
    editing.merge, measuring.judge, checking.compare, plotting.plot, finding.rank_, finding.describe,
    demonstrating.demo, machine.doctor,
):  # fmt: skip
    name_variables(_command, PREFIX)
    main.add_command(_command)


if __name__ == "__main__":
    main()
