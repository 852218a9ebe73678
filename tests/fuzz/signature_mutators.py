"""Mutations of signatures: each field of a Sigstore bundle, and of bakeoff's Ed25519 envelope."""

import base64
import json
import random
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from tests.fuzz.json_mutators import cut, flip, mutate_text, mutate_value, odd_value

Rng = random.Random
Json = dict[str, Any]

P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493
ODD_NUMBERS: tuple[Any, ...] = (
    "-1", "0", "1", "3", "4", "5", "1e3", "007", " 2", "2.0", "9" * 18, str(2**63), str(2**64),
    "9" * 4000, "9" * 5000, 2, -1, 2.5, 1e300, 2**70, True, None, "", [], "٢",
)  # fmt: skip
MEDIA_TYPES = (
    "application/vnd.dev.sigstore.bundle+json;version=0.1",
    "application/vnd.dev.sigstore.bundle+json;version=0.2",
    "application/vnd.dev.sigstore.bundle+json;version=0.3",
    "application/vnd.dev.sigstore.bundle.v0.3+json;x",
    "application/json", "", None, 3,
)  # fmt: skip
CAP = 128 * 1024


def mutate_signature(rng: Rng, name: str, signature: bytes, other: bytes) -> bytes:
    """Change one thing about a signature's file; `other` is one of another run."""
    if rng.random() < 0.2:
        return mutate_text(rng, signature)
    try:
        document, stranger = json.loads(signature), json.loads(other)
        changes = _ENVELOPE if name.endswith("ed25519.json") else _SIGSTORE
        rng.choice(changes)(rng, document, stranger)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return mutate_text(rng, signature)  # a former mutation has left nothing to change here
    return json.dumps(document).encode()


def _fields(bundle: Json) -> list[tuple[Json, str]]:
    """Where a bundle keeps bytes in base64."""
    material, message = bundle["verificationMaterial"], bundle["messageSignature"]
    entry = material["tlogEntries"][0]
    return [
        (material["certificate"], "rawBytes"),
        (message, "signature"),
        (message["messageDigest"], "digest"),
        (entry["logId"], "keyId"),
        (entry["inclusionPromise"], "signedEntryTimestamp"),
        (entry["inclusionProof"], "rootHash"),
        (entry, "canonicalizedBody"),
    ]


def _entry(bundle: Json) -> Json:
    return bundle["verificationMaterial"]["tlogEntries"][0]


def _bytes_of_a_field(rng: Rng, bundle: Json, _: Json) -> None:
    holder, name = rng.choice(_fields(bundle))
    raw = base64.b64decode(holder[name])
    raw = rng.choice([flip, flip, cut, lambda _, data: data + b"\x00", lambda *_: b""])(rng, raw)
    holder[name] = base64.b64encode(raw).decode()


def _base64_variant(rng: Rng, bundle: Json, _: Json) -> None:
    holder, name = rng.choice(_fields(bundle))
    holder[name] = otherwise_in_base64(rng, holder[name])


def otherwise_in_base64(rng: Rng, text: str) -> str:
    """Spell base64 in a way that some decoders take for the same bytes."""
    at = rng.randrange(len(text) + 1)
    bare = text.rstrip("=")
    return rng.choice(
        [
            text[:at] + rng.choice(["\n", " ", "\r\n", "-", "=", "\x00", "é"]) + text[at:],
            text.translate(str.maketrans("+/", "-_")),
            bare,
            text + "=",
            text + "====",
            bare[:-1] + chr(ord(bare[-1]) ^ 1) + "=" * (-len(bare) % 4),
            text + text,
            base64.b32encode(base64.b64decode(text)).decode(),
        ]
    )


def _field_replaced(rng: Rng, bundle: Json, _: Json) -> None:
    holder, name = rng.choice(_fields(bundle))
    holder[name] = odd_value(rng)


def _checkpoint(rng: Rng, bundle: Json, other: Json) -> None:
    proof = _entry(bundle)["inclusionProof"]
    note: str = proof["checkpoint"]["envelope"]
    head, line = note.rstrip("\n").rsplit("\n", 1)
    origin, size, root = head.split("\n")[:3]
    junk = f"\u2014 {origin} {base64.b64encode(b'j' * 75).decode()}"
    proof["checkpoint"]["envelope"] = rng.choice(
        [
            head + "\n" + "\n".join([junk] * rng.choice([1, 3, 100, 1000])) + f"\n{line}\n",
            head + "\n" + f"{line}\n" * rng.choice([2, 50, 600]),
            head + "\n" + f"{line}\n" + "\u2014 x y\n" * ((CAP - 12_000) // 12),
            head + "\n",
            note.replace(origin, rng.choice(["", "other.log", origin + " ", origin.upper()])),
            note.replace(f"\n{size}\n", f"\n{rng.choice(['5', '-4', '04', '9' * 3000, ''])}\n"),
            note.replace(root, rng.choice(["", root[:-4], root[::-1]])),
            note.replace("\n\n", "\nextra line\n\n"),
            note.replace("\n", "\r\n"),
            note.replace("\u2014", "-"),
            note + "\n",
            note + "trailing",
            "\n" * rng.choice([1, 100, 50_000]),
            _entry(other)["inclusionProof"]["checkpoint"]["envelope"],
        ]
    )


def _number(rng: Rng, bundle: Json, _: Json) -> None:
    entry = _entry(bundle)
    proof = entry["inclusionProof"]
    places = [(entry, "logIndex"), (entry, "integratedTime"), (proof, "logIndex")]
    holder, name = rng.choice([*places, (proof, "treeSize")])
    nudged = str(int(holder[name]) + rng.choice([-1, 1, 60, -86400, 86400 * 365]))
    holder[name] = rng.choice([*ODD_NUMBERS, nudged, nudged, nudged, int(holder[name])])


def _hashes(rng: Rng, bundle: Json, other: Json) -> None:
    proof = _entry(bundle)["inclusionProof"]
    hashes = proof["hashes"]
    proof["hashes"] = rng.choice(
        [
            hashes[:1],
            [],
            hashes[::-1],
            [*hashes, hashes[0]],
            hashes * 700,
            _entry(other)["inclusionProof"]["hashes"],
            ["", *hashes[1:]],
            [base64.b64encode(b"short").decode()] * 2,
            None,
        ]
    )


def _parts_of_another(rng: Rng, bundle: Json, other: Json) -> None:
    """What is good by itself, taken from another run's signature."""
    material, theirs = bundle["verificationMaterial"], other["verificationMaterial"]
    entry, their_entry = _entry(bundle), _entry(other)
    holder, name, taken = rng.choice(
        [
            (material, "certificate", theirs["certificate"]),
            (material, "tlogEntries", theirs["tlogEntries"]),
            (material, "tlogEntries", [entry, their_entry]),
            (material, "tlogEntries", [their_entry, entry]),
            (bundle, "messageSignature", other["messageSignature"]),
            (bundle, "verificationMaterial", theirs),
            (bundle["messageSignature"], "signature", other["messageSignature"]["signature"]),
            (entry, "canonicalizedBody", their_entry["canonicalizedBody"]),
            (entry, "inclusionPromise", their_entry["inclusionPromise"]),
            (entry, "inclusionProof", their_entry["inclusionProof"]),
            (entry, "logIndex", their_entry["logIndex"]),
        ]
    )
    holder[name] = taken


def _log_body(rng: Rng, bundle: Json, _: Json) -> None:
    entry = _entry(bundle)
    body = json.loads(base64.b64decode(entry["canonicalizedBody"]))
    text = mutate_text if rng.random() < 0.4 else None
    raw = json.dumps(body if text else mutate_value(rng, body)).encode()
    raw = text(rng, raw) if text else raw
    entry["canonicalizedBody"] = base64.b64encode(raw).decode()


def _other_material(rng: Rng, bundle: Json, _: Json) -> None:
    """The forms of a bundle that are not ours: chains, managed keys, attestations, timestamps."""
    material = bundle["verificationMaterial"]
    certificate = material["certificate"]
    envelope = {
        "payload": base64.b64encode(b"{}").decode(),
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"sig": bundle["messageSignature"]["signature"], "keyid": ""}],
    }
    choice = rng.randrange(8)
    if choice == 0:
        del bundle["messageSignature"]
        bundle["dsseEnvelope"] = envelope
    elif choice == 1:
        bundle["dsseEnvelope"] = envelope
    elif choice == 2:
        del material["certificate"]
        material["publicKey"] = {"hint": rng.choice(["key", "", None])}
    elif choice == 3:
        material["publicKey"] = {"hint": "key"}
    elif choice == 4:
        del material["certificate"]
        chain = [certificate] * rng.choice([0, 1, 2, 40])
        material["x509CertificateChain"] = {"certificates": chain}
        bundle["mediaType"] = rng.choice(MEDIA_TYPES[:4])
    elif choice == 5:
        stamp = base64.b64encode(rng.choice([b"", b"0\x00", b"0" * 500])).decode()
        stamps = [{"signedTimestamp": stamp}] * rng.choice([1, 2, 33, 400])
        material["timestampVerificationData"] = {"rfc3161Timestamps": stamps}
        if rng.random() < 0.5:
            _entry(bundle).pop("inclusionPromise", None)
    elif choice == 6:
        bundle["mediaType"] = rng.choice(MEDIA_TYPES)
    else:
        digest = bundle["messageSignature"]["messageDigest"]
        digest["algorithm"] = rng.choice(["SHA2_512", "SHA3_256", "", 1, 2, None, "sha2_256"])


def _malleable(rng: Rng, bundle: Json, _: Json) -> None:
    """The other signature that ECDSA takes for the same: s becomes n - s; and other DER."""
    message = bundle["messageSignature"]
    r, s = decode_dss_signature(base64.b64decode(message["signature"]))
    raw = rng.choice(
        [
            encode_dss_signature(r, P256_ORDER - s),
            encode_dss_signature(r, s + P256_ORDER),
            encode_dss_signature(0, s),
            encode_dss_signature(r, 0),
            r.to_bytes(32) + s.to_bytes(32),
            base64.b64decode(message["signature"]) + b"\x00",
        ]
    )
    message["signature"] = base64.b64encode(raw).decode()


def _spelled_in_snake_case(rng: Rng, bundle: Json, _: Json) -> None:
    """Protobuf's JSON may name members either way; may a bundle have both?"""
    both = rng.random() < 0.5
    entry = _entry(bundle)
    for name, snake in (("logIndex", "log_index"), ("integratedTime", "integrated_time")):
        entry[snake] = "7" if both else entry.pop(name)


def _any_place(rng: Rng, bundle: Json, _: Json) -> None:
    mutate_value(rng, bundle)


_SIGSTORE: tuple[Callable[[Rng, Json, Json], None], ...] = (
    _bytes_of_a_field, _bytes_of_a_field, _base64_variant, _field_replaced, _checkpoint,
    _checkpoint, _number, _number, _hashes, _parts_of_another, _parts_of_another, _log_body,
    _other_material, _other_material, _malleable, _spelled_in_snake_case, _any_place, _any_place,
)  # fmt: skip


def _sig_field(rng: Rng, envelope: Json, other: Json) -> None:
    sig = envelope["sig"]
    name = rng.choice(list(sig))
    sig[name] = odd_value(rng, other["sig"][name], str(sig[name]).upper())


def _sig_bytes(rng: Rng, envelope: Json, _: Json) -> None:
    raw = base64.b64decode(envelope["sig"]["signature"])
    s = int.from_bytes(raw[32:], "little")
    raw = rng.choice(
        [
            flip(rng, raw),
            raw[:-1],
            raw + b"\x00",
            raw[:32] + ((s + ED25519_ORDER) % 2**256).to_bytes(32, "little"),
            raw[32:] + raw[:32],
            b"\x01" + bytes(63),
            bytes(64),
        ]
    )
    envelope["sig"]["signature"] = base64.b64encode(raw).decode()


def _sig_base64(rng: Rng, envelope: Json, _: Json) -> None:
    envelope["sig"]["signature"] = otherwise_in_base64(rng, envelope["sig"]["signature"])


def _sig_more(rng: Rng, envelope: Json, other: Json) -> None:
    rng.choice([envelope, envelope["sig"]])[rng.choice(["result", "sig2", "sha512"])] = other


_ENVELOPE: tuple[Callable[[Rng, Json, Json], None], ...] = (
    _sig_field, _sig_bytes, _sig_bytes, _sig_base64, _sig_more, _any_place,
)  # fmt: skip
