"""`worker run`: the production worker."""

from __future__ import annotations

import argparse

from worker.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: the settings come from the environment."""


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Work until a signal; the exit codes are the contract's."""
    from worker import log
    from worker.app import App

    log.configure(settings.log)
    return App(settings).run()
