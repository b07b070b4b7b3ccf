"""`python -m engine`: reads arguments, calls the command, turns its errors into one line and an exit code.

Exit codes: 0 done; 1 the work was done but something in it failed (an image, a device); 2 bad arguments, bundle or backend;
130 after Ctrl-C. Nothing heavy is imported here; a command is imported when it is named.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from typing import NoReturn

COMMANDS = {
    "classify": "score images, without Kafka or Redis",
    "inspect": "what is in a model bundle or a compiled plan; verifies the digests",
    "export": "write the bundle as one ONNX graph",
    "build": "compile a TensorRT plan",
    "parity": "compare the scores of backends",
    "bench": "throughput and latency by batch size",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: {message}; try --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _Parser(prog="python -m engine", description="CoDE detector: is an image AI-generated?")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    try:
        for name, help_line in COMMANDS.items():
            command = commands.add_parser(name, help=help_line, description=help_line)
            if arguments[:1] == [name]:
                importlib.import_module(f"engine.commands.{name}").add_arguments(command)
        parsed = parser.parse_args(arguments)
        # A name in another encoding than the terminal's must not end the command.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return _run(parsed)
    except KeyboardInterrupt:
        # Threads may still be decoding an image: a second Ctrl-C must not print where it hit them.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return 130
    except OSError as error:
        # Else Python tries to write what is left at its end, and complains once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader of our output is gone (`| head`): quiet, as every filter is
            return 128 + signal.SIGPIPE
        print(f"engine {arguments[0]}: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        return 1


def _run(parsed: argparse.Namespace) -> int:
    import structlog

    from engine.backends.base import BackendUnavailable, DeviceError, OutOfDeviceMemory
    from engine.bundle import BundleError
    from engine.commands import CommandError

    # Standard output is for results.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    try:
        code = int(importlib.import_module(f"engine.commands.{parsed.command}").run(parsed))
        sys.stdout.flush()
        return code
    except (BundleError, BackendUnavailable, CommandError) as error:
        print(f"engine {parsed.command}: {error}", file=sys.stderr)
        return 2
    except (DeviceError, OutOfDeviceMemory) as error:
        print(f"engine {parsed.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
