"""Certificates, a service account and its tokens for the stand-in of the API. All are made anew by each process."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import secrets
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

#: How far the clock of who signs a JWT may be ahead.
JWT_LEEWAY_SECONDS = 60
#: The longest life of a JWT that the service accepts.
JWT_MAX_SECONDS = 3600
OFFICIAL_AUDIENCE = "https://iam.api.cloud.yandex.net/iam/v1/tokens"


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def random_id(prefix: str) -> str:
    """An id as Yandex Cloud makes them: 20 letters and digits."""
    return prefix + "".join(secrets.choice("abcdefghijklmnopqrstuv0123456789") for _ in range(20 - len(prefix)))


def issue_certificates(directory: Path, days: int = 30) -> tuple[Path, Path, Path]:
    """Make a CA and a certificate of it for localhost.

    Returns the files of the CA's certificate, the server's certificate and the server's key; the CA's own key is
    not kept.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.timezone.utc)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = name(f"ml_platform dev cloud {secrets.token_hex(4)}")

    def builder(subject: x509.Name, public_key: Any) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=days))
        )

    authority = (
        builder(ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(False, False, False, False, False, True, True, False, False),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        builder(name("localhost"), key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    files = directory / "ca.pem", directory / "server.pem", directory / "server.key"
    pem = serialization.Encoding.PEM
    files[0].write_bytes(authority.public_bytes(pem))
    files[1].write_bytes(certificate.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_private(files[2], private)
    return files


@cache
def _private_key() -> RSAPrivateKey:
    """One for all accounts of this process: to find the primes takes longer than a short-lived stand-in works."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


class ServiceAccount:
    """A service account with one authorized key, whose private half only the key file holds."""

    def __init__(self, directory: Path, account_id: str) -> None:
        from cryptography.hazmat.primitives import serialization

        self.id, self.key_id = account_id, random_id("aje")
        private = _private_key()
        self._public_key = private.public_key()
        pem = serialization.Encoding.PEM
        public_pem = self._public_key.public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        private_pem = private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        note = f"PLEASE DO NOT REMOVE THIS LINE! Yandex.Cloud SA Key ID <{self.key_id}>\n"
        key = {
            "id": self.key_id,
            "service_account_id": self.id,
            "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat().replace("+00:00", "Z"),
            "key_algorithm": "RSA_2048",
            "public_key": public_pem.decode(),
            "private_key": note + private_pem.decode(),
        }
        self.key_file = directory / "service_account_key.json"
        write_private(self.key_file, json.dumps(key, indent=2).encode())

    def verify(self, token: str, audiences: list[str], skew_seconds: float) -> str | None:
        """What is wrong with a JWT that is to be exchanged for a token, or None.

        Its times are judged by this machine's clock plus `skew_seconds`, as the SDK signs by the machine's clock.
        """
        import jwt

        now = time.time() + skew_seconds
        try:
            header = jwt.get_unverified_header(token)
            if header.get("kid") != self.key_id:
                return "JWT: unknown key id"
            required: Any = {"require": ["iss", "aud", "iat", "exp"], "verify_exp": False, "verify_iat": False}
            claims = jwt.decode(token, self._public_key, algorithms=["PS256"], audience=audiences, options=required)
        except jwt.InvalidTokenError as error:
            return f"JWT: {error}"
        if claims["iss"] != self.id:
            return "JWT: the issuer is not the key's service account"
        if claims["exp"] <= now:
            return "JWT: expired"
        if claims["iat"] > now + JWT_LEEWAY_SECONDS:
            return "JWT: issued in the future"
        if claims["exp"] - claims["iat"] > JWT_MAX_SECONDS:
            return f"JWT: lives longer than {JWT_MAX_SECONDS} seconds"
        return None
