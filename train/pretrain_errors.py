"""What ends a pretraining run: each error is one line that says why and where the last good state lies.

PretrainError: training cannot start or go on
├── NonFiniteLossError: loss or gradient is not a finite number; nothing was stepped
└── RankLostError: another process of the run ended; this one cannot go on alone
"""

from __future__ import annotations


class PretrainError(Exception):
    """Training cannot start or go on; one line that says why."""


class NonFiniteLossError(PretrainError):
    """The loss or its gradient was not a finite number; nothing was stepped."""


class RankLostError(PretrainError):
    """Another process of the run is gone."""
