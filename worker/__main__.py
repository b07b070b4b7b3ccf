"""`python -m worker`: reads arguments and settings, calls the command, turns its errors into one line and an exit code.

Nothing heavy is imported here, so that `--help` and wrong arguments answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from typing import NoReturn

COMMANDS = {
    "run": "the production worker; settings from the environment",
    "dev": "embedded broker, cache, worker and console in one command",
    "console": "the page for operators and moderators: live verdicts, explanations, review",
    "submit": "publish an upload event for each file, folder or URL",
    "watch": "print verdicts as they arrive",
    "dead": "look into the dead-letter topic and publish records again",
    "check": "print the effective settings and probe broker, cache, bundle and engine",
    "schema": "write JSON Schemas of event, verdict and dead letter",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: {message}; try --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from worker import settings as settings_module
    from worker.errors import FatalError

    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _Parser(prog="python -m worker", description="CoDE moderation worker")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_line in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, description=help_line)
        if arguments[:1] == [name]:
            importlib.import_module(f"worker.commands.{name}").add_arguments(command)
    parsed = parser.parse_args(arguments)
    try:
        settings = settings_module.load()
        return int(importlib.import_module(f"worker.commands.{parsed.command}").run(parsed, settings))
    except FatalError as error:
        for line in getattr(error, "problems", [str(error)]):
            print(f"worker {parsed.command}: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): quiet, as every filter is. Python would complain at exit otherwise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
