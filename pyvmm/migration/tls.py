"""TLS with mutual certificates for migration: each side proves who it is, and only to somebody who does, too.

A folder of credentials has QEMU's file names (docs/system/tls.rst, x509): ``ca-cert.pem``, ``server-cert.pem``,
``server-key.pem`` for the destination, ``client-cert.pem``, ``client-key.pem`` for the source. ``pyvmm certs`` makes
one.
The names in the server's certificate are checked against the host connected to; a unix socket has none, so there the
authority's signature is what counts.
"""

from __future__ import annotations

import datetime
import os
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from pyvmm.errors import ChannelError, ConfigError

if TYPE_CHECKING:
    from cryptography import x509

LIFETIME = datetime.timedelta(days=3650)
_FILES = {"server": ("server-cert.pem", "server-key.pem"), "client": ("client-cert.pem", "client-key.pem")}
AUTHORITY = "ca-cert.pem"


def _context(folder: str, role: str) -> ssl.SSLContext:
    """TLS 1.3 only: both ends are pyvmm's. ConfigError names the file that is missing or wrong."""
    base = Path(folder)
    certificate, key = (base / name for name in _FILES[role])
    for path in (base / AUTHORITY, certificate, key):
        if not path.is_file():
            raise ConfigError(f"{path} is missing: make credentials with pyvmm certs {folder}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if role == "server" else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(base / AUTHORITY)
        context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{folder}: the {role}'s credentials cannot be used: {error}") from None
    return context


def secure_client(sock: socket.socket, folder: str, hostname: str | None) -> socket.socket:
    """``sock`` with TLS on it, as the one that connected. ChannelError if the other side is not who it should be."""
    context = _context(folder, "client")
    context.check_hostname = hostname is not None
    return _wrap(context, sock, server_side=False, hostname=hostname)


def secure_server(sock: socket.socket, folder: str) -> socket.socket:
    """``sock`` with TLS on it, as the one that was connected to."""
    return _wrap(_context(folder, "server"), sock, server_side=True, hostname=None)


def _wrap(context: ssl.SSLContext, sock: socket.socket, *, server_side: bool, hostname: str | None) -> socket.socket:
    try:
        return context.wrap_socket(sock, server_side=server_side, server_hostname=hostname)
    except TimeoutError:
        raise ChannelError("TLS: the other side did not answer; does it use TLS, too?") from None
    except (ssl.SSLError, OSError) as error:
        raise ChannelError(f"TLS: {getattr(error, 'reason', None) or error}") from None


def make_credentials(folder: Path, hosts: list[str]) -> list[Path]:
    """A new authority and one certificate for each role, good for ``hosts`` (names or addresses); the files written.

    The authority's key is not kept, so nobody can ever sign another certificate with it. ConfigError if there is
    something in the folder already.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    taken = [name for name in (AUTHORITY, *_FILES["server"], *_FILES["client"]) if (folder / name).exists()]
    if taken:
        raise ConfigError(f"{folder / taken[0]} exists: name another folder, or remove it")
    now = datetime.datetime.now(datetime.UTC)

    def name_of(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def start(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder(name_of("pyvmm migration authority"), name_of(subject), key.public_key())
            .serial_number(x509.random_serial_number())
            # Clocks of two hosts differ; an hour is forgiven.
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + LIFETIME)
        )

    authority = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        start("pyvmm migration authority", authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority, hashes.SHA256())
    )
    files = {AUTHORITY: certificate.public_bytes(serialization.Encoding.PEM)}
    usages = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}
    for role, (certificate_name, key_name) in _FILES.items():
        key = ec.generate_private_key(ec.SECP256R1())
        signed = (
            start(f"pyvmm migration {role}", key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usages[role]]), critical=True)
            .add_extension(x509.SubjectAlternativeName([_alternative_name(host) for host in hosts]), critical=False)
            .sign(authority, hashes.SHA256())
        )
        files[certificate_name] = signed.public_bytes(serialization.Encoding.PEM)
        files[key_name] = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, content in files.items():
            fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as out:
                out.write(content)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from None
    return [folder / name for name in files]


def _alternative_name(host: str) -> x509.GeneralName:
    import ipaddress

    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise ConfigError(f"--host {host!r}: write a host name or an address") from None
