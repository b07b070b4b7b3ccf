"""Objects of s3 and gs addresses, read as the worker reads them: the standard variables of AWS and Google name credentials,
region and endpoint; an http endpoint that the operator wrote is used as it stands."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

S3_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
GS_ENDPOINT_VARIABLES = ("GOOGLE_BASE_URL", "STORAGE_EMULATOR_HOST")
TIMEOUT_S = 20.0
RETRIES = 2


def read_object(scheme: str, bucket: str, key: str, max_bytes: int) -> bytes:
    """The bytes of an object. `scheme`: s3 or gs. Raises LookupError: it cannot be had, or is too large."""
    import obstore
    from obstore.exceptions import BaseError

    try:
        result = obstore.get(_opened(scheme, bucket), key)
        if result.meta["size"] > max_bytes:
            raise LookupError("image too large")
        return bytes(result.bytes())
    except (BaseError, OSError) as exc:  # obstore says FileNotFoundError of what is not there
        # Its message holds endpoints and addresses.
        raise LookupError(f"{scheme} object not to be had ({type(exc).__name__})") from exc


def _opened(scheme: str, bucket: str) -> Any:
    from obstore.store import GCSStore, S3Store

    within = timedelta(seconds=TIMEOUT_S)
    # A store that is down must not hold up a job of thousands of labels.
    retry: Any = {"max_retries": RETRIES, "retry_timeout": within}
    client: Any = {"timeout": within, "connect_timeout": within}
    endpoint = _first(S3_ENDPOINT_VARIABLES if scheme == "s3" else GS_ENDPOINT_VARIABLES)
    config: dict[str, Any] = {}
    if scheme == "gs" and endpoint and not os.environ.get("GOOGLE_BASE_URL"):
        # Google's own clients read this variable, with or without a scheme, and send no credentials then.
        endpoint = endpoint if "://" in endpoint else f"http://{endpoint}"
        config = {"base_url": endpoint.rstrip("/"), "skip_signature": True}
    if endpoint.lower().startswith("http://"):
        client["allow_http"] = True
    store = S3Store if scheme == "s3" else GCSStore
    return store(bucket, client_options=client, retry_config=retry, **config)


def _first(variables: tuple[str, ...]) -> str:
    return next((value for name in variables if (value := os.environ.get(name))), "")
