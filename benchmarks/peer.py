"""Run heretic 1.4.0 (AGPL), as a program in an environment of its own, on the prompts of a benchmark.

It asks at a terminal which of its trials to keep and where to write it; pexpect answers.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ENTER, INTERRUPT = "\r", "\x03"
WAIT = 300  # seconds for what is not a search
REFUSALS = r"Refusals: *(\d+)/(\d+)"


def _heed_interrupts() -> None:
    """A background shell lets its programs ignore SIGINT, and they pass that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class PeerResult:
    """What the program wrote.

    Attributes:
        model: folder of its checkpoint.
        seconds: from its start to the end of its search.
        trials: edits that it tried.
        refusals: share of refusals that it counts for the edit chosen, which is the one with the fewest.
    """

    model: Path
    seconds: float
    trials: int
    refusals: float


@dataclass(frozen=True)
class Peer:
    """The program and what to spend on it.

    Attributes:
        program: the `heretic` of its environment.
        trials: the most edits to try.
        limit: seconds after which its search is interrupted, as its user would.
        batch: prompts at a time.
    """

    program: Path
    trials: int
    limit: float
    batch: int = 64

    def run(self, model: Path, out: Path, target: Sequence[str], harmless: Sequence[str]) -> PeerResult:
        """Search with it on three quarters of each list, evaluate on the rest, write the edit that refuses least."""
        import pexpect

        out.mkdir(parents=True, exist_ok=True)
        self._configure(model, out, target, harmless)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm", "COLUMNS": "200"}
        started = time.perf_counter()
        with (out / "log.txt").open("w", encoding="utf-8") as log:
            terminal = pexpect.spawn(
                str(self.program), cwd=out, env=environment, encoding="utf-8", timeout=WAIT, dimensions=(60, 200),
                preexec_fn=_heed_interrupts,
            )  # fmt: skip
            terminal.logfile_read = log
            terminal.expect("Running trial")
            try:
                terminal.expect("Which trial", timeout=self.limit)
            except pexpect.TIMEOUT:
                terminal.send(INTERRUPT)
                terminal.expect("Which trial")
            seconds = time.perf_counter() - started
            terminal.expect(REFUSALS)
            found = terminal.match
            assert isinstance(found, re.Match)
            refusals = int(found[1]) / int(found[2])
            for question, answer in (
                ("", ""), ("What do you want to do", ""), ("Path to the folder", str(out / "edited")),
                ("How do you want to export", ""),
            ):  # fmt: skip
                if question:
                    terminal.expect(question)
                time.sleep(1)  # its menus drop what is typed before they are drawn
                terminal.send(answer + ENTER)
            terminal.expect("Model saved")
            terminal.close(force=True)
        plain = re.sub(r"\x1b\[[\d;]*m", "", (out / "log.txt").read_text("utf-8"))
        return PeerResult(out / "edited", seconds, int(re.findall(r"Running trial +(\d+)", plain)[-1]), refusals)

    def _configure(self, model: Path, out: Path, target: Sequence[str], harmless: Sequence[str]) -> None:
        lines = [
            f"model = {json.dumps(str(model))}",
            'response_prefix = ""',
            f"batch_size = {self.batch}",
            f"n_trials = {self.trials}",
            f"n_startup_trials = {max(1, round(0.3 * self.trials))}",  # as much of all as by default
            "seed = 0",
        ]
        for name, prompts in (("bad", target), ("good", harmless)):
            fitted = 3 * len(prompts) // 4
            for use, part in (("prompts", prompts[:fitted]), ("evaluation_prompts", prompts[fitted:])):
                file = out / f"{name}_{use}.txt"
                file.write_text("\n".join(part) + "\n", "utf-8")
                lines += [f"[{name}_{use}]", f"dataset = {json.dumps(str(file))}"]
        (out / "config.toml").write_text("\n".join(lines) + "\n", "utf-8")
