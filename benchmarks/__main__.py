"""python -m benchmarks run | report | evaluate | sweep | speed | check; --help after each."""

import contextlib
import functools
import importlib
import io
import os
import sys
from collections.abc import Callable

import tyro

from benchmarks.jobs import UsageError

VERBS = ("run", "report", "evaluate", "sweep", "speed", "check")


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status is the verb's, 2 for wrong usage, 130 after Ctrl-C."""
    with contextlib.suppress(AttributeError):  # of a stdout that is no file
        sys.stdout.reconfigure(errors="backslashreplace")  # what it cannot show is no error
    try:
        return parse(sys.argv[1:] if argv is None else argv)()
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


def parse(argv: list[str]) -> Callable[[], int]:
    """The verb with its options, to be called. Raises UsageError with one sentence, where tyro would draw a box."""

    def later(verb: Callable[..., int]) -> Callable[..., Callable[[], int]]:
        return functools.wraps(verb)(lambda *given, **named: functools.partial(verb, *given, **named))

    verbs = {name: later(importlib.import_module(f"benchmarks.{name}").main) for name in VERBS}
    read = functools.partial(tyro.extras.subcommand_cli_from_dict, verbs, prog="python -m benchmarks")
    if {"-h", "--help"} & set(argv):
        return read(args=argv, description=__doc__)
    box = io.StringIO()
    try:
        with contextlib.redirect_stdout(box), contextlib.redirect_stderr(box):
            return read(args=argv, description=__doc__)
    except SystemExit as leaving:
        if not leaving.code:  # it has printed what was asked for
            print(box.getvalue(), end="")
            raise
        from ppo import sentence_of  # not before, because it loads torch

        raise UsageError(sentence_of(box.getvalue())) from None


if __name__ == "__main__":
    sys.exit(main())
