"""Answers of a broker that no waiting and no re-send cures: the worker ends with exit code 3."""

from __future__ import annotations

from kafka import errors as kafka_errors

REFUSALS = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedVersionError,
    kafka_errors.UnsupportedCompressionTypeError,
    kafka_errors.InvalidTopicError,
    kafka_errors.InvalidRecordError,
    kafka_errors.InvalidTimestampError,
    kafka_errors.PolicyViolationError,
)
"""Of a producer, whether it publishes in transactions or not."""
