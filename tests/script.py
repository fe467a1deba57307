"""A script of the repository, run as a user runs it, in a process that costs a fork."""

from __future__ import annotations

import os
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tests.forkserver import CONTEXT

ROOT = Path(__file__).resolve().parents[1]


def run_script(script: str, arguments: list[str], folder: Path) -> str:
    """What `script`, a path below the root, prints with these arguments from the working directory `folder`.

    Raises AssertionError, with what it wrote to stderr, unless it exits with 0.
    """
    process = CONTEXT.Process(target=_run, args=(ROOT / script, arguments, folder))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
    errors = folder / "stderr.txt"
    assert process.exitcode == 0, errors.read_text()[-3000:] if errors.exists() else process.exitcode
    return (folder / "stdout.txt").read_text()


def _run(script: Path, arguments: list[str], folder: Path) -> None:
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    checkout = {str(ROOT), str(ROOT / "kernels"), ""}
    sys.path[:] = [str(script.parent), *(path for path in sys.path if path not in checkout)]
    with (
        open("stdout.txt", "w") as out,
        open("stderr.txt", "w") as errors,
        redirect_stdout(out),
        redirect_stderr(errors),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Exception:
            sys.excepthook(*sys.exc_info())
            raise
