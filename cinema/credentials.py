"""Content Credentials: who made a film and how, signed and written into the file by C2PA's own library."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256, shake_256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, utils

from cinema.errors import UserError
from cinema.files import atomic
from cinema.story import read_text

AI_MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
LABEL = "captain-cinema.film"  # of what we say ourselves
PEM, PKCS8, PLAIN = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----\n?")


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What the Content Credentials of a file are worth."""

    credentials: Literal["valid", "absent", "broken"]  #: valid: unchanged, and signed by a key that is trusted here
    signer: str | None = None  #: whose key it is, if valid
    reason: str | None = None  #: why they are broken
    told: dict[str, Any] = field(default_factory=dict)  #: what they say of the film, if valid


def signing_key() -> tuple[bytes, str]:
    """A private key and the certificates for it, in PEM.

    They are in the files that `CINEMA_SIGNING_KEY` and `CINEMA_SIGNING_CERTIFICATE` name. Without these it is a
    development key, made once, kept with the user's data. UserError if a file is missing.
    """
    key, chain = (os.environ.get(f"CINEMA_SIGNING_{what}", "") for what in ("KEY", "CERTIFICATE"))
    if key or chain:
        wanted = "a PEM file in CINEMA_SIGNING_KEY and in CINEMA_SIGNING_CERTIFICATE"
        return read_text(Path(key), wanted).encode(), read_text(Path(chain), wanted)
    path = _development()
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic(path) as part:
            part.touch(0o600)
            part.write_bytes(_new_key())
    return path.read_bytes(), "".join(CERTIFICATE.findall(path.read_text()))


def _development() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "cinema" / "development.pem"


def _new_key() -> bytes:
    """A key and a certificate that it signs itself, with the extensions that C2PA asks for."""
    key, oid, begin = ed25519.Ed25519PrivateKey.generate(), x509.NameOID, datetime(2020, 1, 1, tzinfo=UTC)
    told = {oid.COMMON_NAME: "development key of cinema", oid.ORGANIZATION_NAME: "self-signed, proves no identity"}
    name, public = x509.Name([x509.NameAttribute(*pair) for pair in told.items()]), key.public_key()
    new = x509.CertificateBuilder(name, name, public, x509.random_serial_number(), begin, begin.replace(2120))
    new = new.add_extension(x509.BasicConstraints(False, None), True)
    new = new.add_extension(x509.KeyUsage(True, *[False] * 8), True)
    new = new.add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
    new = new.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), False)
    return key.private_bytes(PEM, PKCS8, PLAIN) + new.sign(key, None).public_bytes(PEM)


def sign(film: Path, title: str, about: dict[str, Any]) -> None:
    """Write into an MP4 that a model made it, and what is told `about` it; no network, so no time stamp.

    The same film with the same words and key has the same bytes. UserError for a key that cannot sign; it has to be
    Ed25519, or P-256 for ES256.
    """
    pem, chain = signing_key()
    try:
        key: Any = serialization.load_pem_private_key(pem, None)
        algorithm = {"ed25519": c2pa.C2paSigningAlg.ED25519, "secp256r1": c2pa.C2paSigningAlg.ES256}[
            key.curve.name if isinstance(key, ec.EllipticCurvePrivateKey) else type(key).__name__[:7].lower()
        ]
    except (ValueError, TypeError, KeyError):
        raise UserError(
            "CINEMA_SIGNING_KEY: no key that can sign is there; give Ed25519 or P-256, unencrypted"
        ) from None
    identity = UUID(bytes=sha256(film.read_bytes()).digest()[:16], version=4)
    made = {"action": "c2pa.created", "digitalSourceType": AI_MADE, "softwareAgent": {"name": "cinema"}}
    manifest = {
        "title": title,
        "label": f"urn:c2pa:{identity}",
        "instance_id": f"xmp:iid:{identity}",
        "claim_generator_info": [{"name": "cinema", "version": version("cinema")}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [made]}}, {"label": LABEL, "data": about}],
    }
    claims: list[bytes] = []

    def answer(claim: bytes) -> bytes:
        claims.append(claim)
        return _signature(key, claim)

    try:
        with atomic(film) as part, c2pa.Signer.from_callback(answer, algorithm, chain) as signer:
            store = c2pa.Builder(manifest).sign_file(str(film), str(part), signer)
            part.write_bytes(part.read_bytes().replace(store, _settle(store, claims[-1], key, pem)))
    except c2pa.C2paError as error:
        raise UserError(f"{film}: cannot be signed with CINEMA_SIGNING_CERTIFICATE ({error}); give its chain") from None


def _signature(key: Any, claim: bytes) -> bytes:
    """Without randomness, whichever key it is."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(claim)
    r, s = utils.decode_dss_signature(key.sign(claim, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))
    return r.to_bytes(32) + s.to_bytes(32)


def _settle(store: bytes, claim: bytes, key: Any, secret: bytes) -> bytes:
    """A signed manifest store without the library's randomness: salts are made of the secret key and what they salt."""
    settled, signature = store, _signature(key, claim)
    for box in re.finditer(rb"(?s)(....)jumb....jumd.{17}[^\0]+\0....c2sh(.{16})", store):
        old = store[box.start() + 8 : box.start() + int.from_bytes(box[1])]
        new = old.replace(box[2], shake_256(secret + old.replace(box[2], b"")).digest(16), 1)
        digests = sha256(old).digest(), sha256(new).digest()  # by which the claim names it
        settled, claim = settled.replace(old, new).replace(*digests), claim.replace(*digests)
    return settled.replace(signature, _signature(key, claim))


def read_credentials(path: Path, trusted: Sequence[Path] = ()) -> Credentials:
    """Check the Content Credentials of a file, offline; UserError if a certificate to trust cannot be read.

    Trusted are this user's own development key and certificates in the `trusted` files. What anybody else has signed is
    broken even where it fits the file: whoever forges a manifest signs it, too.
    """
    files = [*trusted, *[_development()] * _development().is_file()]
    anchors = "".join(found for file in files for found in CERTIFICATE.findall(read_text(file, "certificates in PEM")))
    verify = {"verify_trust": True, "remote_manifest_fetch": False, "ocsp_fetch": False}
    try:
        context = c2pa.Context.from_dict({"verify": verify} | ({"trust": {"user_anchors": anchors}} if anchors else {}))
    except c2pa.C2paError as error:
        raise UserError(f"{files[0]}: not a certificate to trust ({error}); give one in PEM") from None
    try:
        with c2pa.Reader(str(path), context=context) as reader:
            state, manifest = reader.get_validation_state(), reader.get_active_manifest() or {}
            faults = (reader.get_validation_results() or {}).get("activeManifest", {}).get("failure", [])
    except (c2pa.C2paError.ManifestNotFound, c2pa.C2paError.NotSupported):
        return Credentials(credentials="absent")
    except c2pa.C2paError as error:
        return Credentials(credentials="broken", reason=str(error))
    by = manifest.get("signature_info", {})
    signer = f"{by.get('common_name')} ({by.get('issuer')})"
    if state == "Trusted":
        told: dict[str, Any] = next((own["data"] for own in manifest["assertions"] if own["label"] == LABEL), {})
        return Credentials(credentials="valid", signer=signer, told=told)
    reason = ", ".join(fault["code"] for fault in faults)
    return Credentials(credentials="broken", reason=f"{reason}; its key calls itself {signer}")
