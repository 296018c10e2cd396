"""python -m benchmarks run | report | sweep | speed | check; --help after each."""

import contextlib
import importlib
import os
import sys

import tyro

from benchmarks.jobs import UsageError

VERBS = ("run", "report", "sweep", "speed", "check")


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status is the verb's, 2 for wrong usage, 130 after Ctrl-C."""
    with contextlib.suppress(AttributeError):  # of a stdout that is no file
        sys.stdout.reconfigure(errors="backslashreplace")  # what it cannot show is no error
    verbs = {name: importlib.import_module(f"benchmarks.{name}").main for name in VERBS}
    try:
        return tyro.extras.subcommand_cli_from_dict(verbs, args=argv, prog="python -m benchmarks", description=__doc__)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a folder that cannot be read, a full disk
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
