"""TLS in front of a plain server on loopback, with a certificate authority made on the spot."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def tls_proxy(target_port: int) -> Iterator[tuple[int, Path]]:
    """The proxy's port on `localhost`, and the file of the authority that signed its certificate."""
    with tempfile.TemporaryDirectory() as folder:
        chain = _certificate(Path(folder))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=_serve, args=(listener, context, target_port), daemon=True).start()
        try:
            yield listener.getsockname()[1], chain
        finally:
            listener.close()


def _serve(listener: socket.socket, context: ssl.SSLContext, target_port: int) -> None:
    while True:
        try:
            plain, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_connect, args=(plain, context, target_port), daemon=True).start()


def _connect(plain: socket.socket, context: ssl.SSLContext, target_port: int) -> None:
    try:
        secured = context.wrap_socket(plain, server_side=True)
        upstream = socket.create_connection(("127.0.0.1", target_port))
    except OSError:
        plain.close()
        return
    threading.Thread(target=_copy, args=(upstream, secured), daemon=True).start()
    _copy(secured, upstream)


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
    except OSError:
        return
    finally:
        target.close()


def _certificate(folder: Path) -> Path:
    """A self-signed certificate and its key in one PEM file; self-signed, it is its own authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path
