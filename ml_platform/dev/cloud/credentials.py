"""Certificates and a service account for the stand-in for Data Proc; each process makes new ones."""

from __future__ import annotations

import datetime
import json
import os
import secrets
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

#: Tolerance for the clock of a JWT's signer running ahead.
JWT_LEEWAY_SECONDS = 60
#: Maximum lifetime of a JWT.
JWT_MAX_SECONDS = 3600
OFFICIAL_AUDIENCE = "https://iam.api.cloud.yandex.net/iam/v1/tokens"


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def random_id(prefix: str) -> str:
    """Random id in Yandex Cloud's format: 20 letters and digits."""
    return prefix + "".join(secrets.choice("abcdefghijklmnopqrstuv0123456789") for _ in range(20 - len(prefix)))


def issue_certificates(directory: Path) -> tuple[Path, Path, Path]:
    """Create a CA and a certificate for localhost signed by it.

    Returns the files of the CA's certificate, the server's certificate and the server's key; the CA's key is not kept.
    """
    import trustme

    authority = trustme.CA(organization_name="ml_platform dev cloud")
    server = authority.issue_cert("localhost", "127.0.0.1")
    ca_file, certificate_file, key_file = (directory / name for name in ("ca.pem", "server.pem", "server.key"))
    authority.cert_pem.write_to_path(ca_file)
    certificate_file.write_bytes(b"".join(part.bytes() for part in server.cert_chain_pems))
    write_private(key_file, server.private_key_pem.bytes())
    return ca_file, certificate_file, key_file


@cache
def _private_key() -> RSAPrivateKey:
    """One key for all accounts of this process, because generating it takes longer than a short-lived stand-in runs."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


class ServiceAccount:
    """A service account with one authorized key, whose private half is only in the key file."""

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
        """Reason to reject a JWT, or None if it is valid.

        Its times are compared with this machine's clock plus `skew_seconds`, because the SDK signs by that clock.
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
