"""The command `hf-dspark`: one function a command, one module a topic. Every expected failure is one line and exit code 2.

Imports: all. Nothing imports torch before a command runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

BAD_INPUT = 2
INTERRUPTED = 130
TRACEBACK_VARIABLE = "HF_DSPARK_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 a check failed, 2 bad input (one line `error: ..` on stderr), 130 interrupted.

    With `HF_DSPARK_TRACEBACK=1` in the environment the whole traceback is shown instead of the line.

    Args:
        arguments: words after the program's name; default `sys.argv[1:]`.
    """
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code (`main` without the exit)."""
    import typer
    from typer.main import get_command

    from hf_dspark.cli.app import app
    from hf_dspark.errors import DSparkError

    try:
        result = get_command(app).main(list(arguments) or ["--help"], prog_name="hf-dspark", standalone_mode=False)
    except typer.TyperException as error:
        return _bad_input(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout has gone; nothing is left to say, not even at shutdown
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, DSparkError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _bad_input(str(error))
    return result if isinstance(result, int) else 0


def _bad_input(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return BAD_INPUT
