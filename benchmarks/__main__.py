"""python -m benchmarks run | report | sweep | speed | check; --help after each."""

import sys

import tyro

from benchmarks import report, run
from benchmarks.jobs import UsageError

VERBS = {"run": run, "report": report}


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status is the verb's, 2 for wrong usage."""
    verbs = {name: module.main for name, module in VERBS.items()}
    try:
        return tyro.extras.subcommand_cli_from_dict(verbs, args=argv, prog="python -m benchmarks", description=__doc__)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
