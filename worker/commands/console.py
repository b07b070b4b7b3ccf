"""`worker console`: the page for operators and moderators."""

from __future__ import annotations

import argparse

from worker.errors import ConfigurationError
from worker.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: the settings come from the environment."""


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Serve until a signal."""
    from worker import log

    log.configure(settings.log)
    try:
        import starlette
        import uvicorn
    except ImportError as error:
        raise ConfigurationError(f"the console needs {error.name}: pip install 'code-moderation-worker[console]'") from error
    del starlette, uvicorn
    from worker.console.server import serve

    return serve(settings)
