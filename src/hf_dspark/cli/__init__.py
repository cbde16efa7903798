"""The command `hf-dspark`: one function a command, one module a topic. Every expected failure is one line and exit code 2.

Imports: all. Nothing imports torch before a command runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main() -> None:
    """Runs the command line and exits: 0 done, 1 a check failed, 2 bad input (one line `error: ..` on stderr), 130 interrupted.

    With `HF_DSPARK_TRACEBACK=1` in the environment the whole traceback is shown instead of the line.
    """
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code (`main` without the exit)."""
    import typer
    from typer.main import get_command

    from hf_dspark.cli.app import app
    from hf_dspark.errors import DSparkError

    try:
        result = get_command(app).main(list(arguments) or ["--help"], prog_name="hf-dspark", standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message()
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone; nothing is left to say, not even at shutdown
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, DSparkError) as error:
        if os.environ.get("HF_DSPARK_TRACEBACK"):
            raise
        message = str(error)
    else:
        return result if isinstance(result, int) else 0
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2
