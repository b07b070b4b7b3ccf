"""One file a command of `python -m engine`: `add_arguments(parser)` and `run(arguments) -> exit code`."""


class CommandError(Exception):
    """The arguments cannot be met; the message is the one line the user sees, the exit code 2."""
