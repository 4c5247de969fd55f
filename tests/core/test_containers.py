"""Two containers on one volume, in each of which the process has number 1: neither harms what the other writes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orthogonalize.core.files import write_atomically
from orthogonalize.core.locks import InUseError, locked
from orthogonalize.core.output_folders import EDITED, complete_folder

TIMES = 20
NAMES = ["orthogonalize.json", *(f"model-{number}.safetensors" for number in range(20))]
BEGIN = """
import os, sys, time
from pathlib import Path
from orthogonalize.core.files import new_partial_file
from orthogonalize.core.locks import InUseError
from orthogonalize.core.output_folders import EDITED, complete_folder
if "patched" in sys.argv:
    os.getpid = lambda: 1
assert os.getpid() == 1
out, mine = Path(sys.argv[2]), sys.argv[3]
"""
HOLDS = (
    BEGIN
    + """
with complete_folder(out, EDITED) as partial, new_partial_file(out.with_name("file.json")):
    (partial / "shard").write_text(mine)
    print("writing", flush=True)
    time.sleep(60)
"""
)
WRITES = (
    BEGIN
    + f"""
ready = out.parent.with_name("ready")  # outside the volume; one that is done before the other begins would meet nobody
ready.mkdir(exist_ok=True)
(ready / mine).touch()
while len(list(ready.iterdir())) < 2:
    time.sleep(0.001)
written = 0
while written < {TIMES}:
    try:
        with complete_folder(out, EDITED, force=True) as partial:
            for name in {NAMES}:
                (partial / name).write_text(mine)
        written += 1
    except InUseError:
        print("refused")
"""
)


@pytest.fixture(params=["patched", "namespace"])
def container(request):
    """Starts a program in a container, as far as numbers of processes are concerned."""
    before: list[str] = []
    if request.param == "namespace":
        before = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
        try:
            if subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
                pytest.skip("no namespaces of process numbers may be made here")
        except FileNotFoundError:
            pytest.skip("unshare is not installed")

    @contextmanager
    def started(program: str, out: Path, text: str) -> Iterator[subprocess.Popen[str]]:
        words = [*before, sys.executable, "-c", program, request.param, str(out), text]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.communicate(timeout=30)

    return started


def test_what_another_container_writes_is_kept_until_it_is_killed(container, tmp_path, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 1)
    out = tmp_path / "out"
    with container(HOLDS, out, "theirs") as process:
        assert process.stdout.readline() == "writing\n"
        with pytest.raises(InUseError, match="process 1"), complete_folder(out, EDITED):
            pass
        write_atomically(tmp_path / "file.json", "mine")
        [folder], [file] = tmp_path.glob(".out.partial-*"), tmp_path.glob(".file.json.*.partial")
        assert (folder / "shard").read_text() == "theirs"
        assert not {folder.name, file.name} & {".out.partial-1", ".file.json.1.partial"}
    with locked(out, wait=True), complete_folder(out, EDITED) as partial:
        assert [path.name for path in tmp_path.glob(".out.partial-*")] == [partial.name]
    write_atomically(tmp_path / "file.json", "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "file.json"}


def test_two_containers_never_mix_their_outputs(container, tmp_path):
    out = tmp_path / "volume" / "out"
    out.parent.mkdir()
    with container(WRITES, out, "first") as one, container(WRITES, out, "second") as two:
        said = [process.communicate(timeout=120)[0] for process in (one, two)]
        assert (one.returncode, two.returncode) == (0, 0)
    assert "refused" in said[0] + said[1], "they never met, which proves nothing"
    assert {path.name: path.read_text() for path in out.iterdir()} in [
        dict.fromkeys(NAMES, m) for m in ("first", "second")
    ]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
