"""The certificate that both public fronts show. Decides nothing; says which file is at fault."""

from __future__ import annotations

import ssl
from pathlib import Path

from router.config import RouterConfig


def read_key_and_chain(config: RouterConfig) -> tuple[bytes, bytes] | None:
    """As PEM; None: without TLS. OSError names the setting and the file."""
    if config.tls_key is None or config.tls_cert is None:
        return None
    key, chain = _read("tls_key", config.tls_key), _read("tls_cert", config.tls_cert)
    try:
        # With a password, which is wrong, nobody is asked for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key, password="")
    except ssl.SSLError as error:
        message = "expected a certificate chain and its unencrypted key, both PEM"
        raise OSError(f"tls_cert {config.tls_cert}, tls_key {config.tls_key}: {message}: {error}") from error
    return key, chain


def _read(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise OSError(f"{name} {path}: {error.strerror}") from error
