"""Runner keys: which spellings and points are keys, and what their signatures hold for."""

import base64
import hashlib
from typing import Any

import pytest
from nacl.signing import SigningKey

from auth.errors import BadSignature, InvalidKey
from auth.keys import RunnerKey, canonical_json, digest_of

KEY = SigningKey(bytes(range(32)))
RAW = bytes(KEY.verify_key)
TEXT = base64.b64encode(RAW).decode()
# The order of the group: S + L verifies where S is not checked to be below it.
L = 2**252 + 27742317777372353535851937790883648493
P = 2**255 - 19


def spelled(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def little(number: int) -> bytes:
    return number.to_bytes(32, "little")


def signed(value: Any, key: SigningKey = KEY) -> tuple[str, bytes]:
    """Return the digest and the raw signature of bakeoff's scheme."""
    digest = hashlib.sha256(canonical_json(value)).digest()
    return digest.hex(), key.sign(digest).signature


def test_a_key_is_named_by_the_sha256_of_its_raw_bytes() -> None:
    key = RunnerKey.parse(TEXT)
    assert (key.raw, key.text) == (RAW, TEXT)
    assert key.fingerprint == hashlib.sha256(RAW).hexdigest()


@pytest.mark.parametrize(
    "text",
    {
        "31 bytes": spelled(RAW[:31]),
        "33 bytes": spelled(RAW + b"\0"),
        "64 bytes": spelled(RAW + RAW),
        "empty": "",
        "space": TEXT[:5] + " " + TEXT[5:],
        "newline": TEXT + "\n",
        "no padding": TEXT.rstrip("="),
        "more padding": TEXT + "=",
        "url-safe": base64.urlsafe_b64encode(b"\xfb\xff" * 16).decode(),
        # The last character carries two bits that belong to no byte.
        "trailing bits": TEXT[:-2] + chr(ord(TEXT[-2]) + 1) + "=",
        "hex": RAW.hex(),
        "not ASCII": "ä" + TEXT[1:],
        "full-width": TEXT.replace("A", "\uff21"),
        "PEM": f"-----BEGIN PUBLIC KEY-----\n{TEXT}\n-----END PUBLIC KEY-----",
        "ssh": f"ssh-ed25519 {TEXT} a@b",
    }.items(),
    ids=lambda item: item[0],
)
def test_only_the_canonical_base64_of_32_bytes_is_a_key(text: tuple[str, str]) -> None:
    with pytest.raises(InvalidKey):
        RunnerKey.parse(text[1])


@pytest.mark.parametrize(
    "raw",
    {
        "identity": little(1),
        "order 2": little(P - 1),
        "order 4": little(0),
        "order 8": bytes.fromhex(
            "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"
        ),
        "order 8, other": bytes.fromhex(
            "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"
        ),
        "identity, y not below p": little(P + 1),
        "identity, sign set": little(1 + 2**255),
        "y = p": little(P),
        "no point": little(2),
        "all ones": b"\xff" * 32,
    }.items(),
    ids=lambda item: item[0],
)
def test_a_key_is_a_point_under_which_one_signature_fits_one_message(
    raw: tuple[str, bytes],
) -> None:
    with pytest.raises(InvalidKey, match="no usable Ed25519 point"):
        RunnerKey.parse(spelled(raw[1]))


def test_canonical_json_is_bakeoffs() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"z": "ä\u2028", "y": ""}}
    expected = b'{"a":{"y":"","z":"\\u00e4\\u2028"},"b":[1,2.5,null,true]}'
    assert canonical_json(value) == expected
    assert digest_of(value) == hashlib.sha256(expected).hexdigest()


def test_a_signature_holds_for_the_value_however_it_is_written() -> None:
    digest, signature = signed({"a": 1, "b": 2})
    RunnerKey.parse(TEXT).verify({"b": 2, "a": 1}, digest, spelled(signature))


def malleated(signature: bytes) -> bytes:
    """Return the other signature that an unchecked S lets through."""
    s = int.from_bytes(signature[32:], "little")
    return signature[:32] + little(s + L)


DIGEST, SIGNATURE = signed({"a": 1})


@pytest.mark.parametrize(
    ("value", "digest", "signature"),
    [
        pytest.param({"a": 2}, DIGEST, spelled(SIGNATURE), id="another value"),
        pytest.param({"a": 2}, digest_of({"a": 2}), spelled(SIGNATURE), id="another digest too"),
        pytest.param({"a": 1}, "0" * 64, spelled(SIGNATURE), id="another digest"),
        pytest.param({"a": 1}, DIGEST.upper(), spelled(SIGNATURE), id="digest in upper case"),
        pytest.param({"a": 1}, DIGEST, spelled(SIGNATURE[:63]), id="63 bytes"),
        pytest.param({"a": 1}, DIGEST, spelled(SIGNATURE + b"\0"), id="65 bytes"),
        pytest.param({"a": 1}, DIGEST, spelled(malleated(SIGNATURE)), id="S + L"),
        pytest.param({"a": 1}, DIGEST, SIGNATURE.hex(), id="hex"),
        pytest.param({"a": 1}, DIGEST, "", id="empty"),
        pytest.param(
            {"a": 1}, DIGEST, spelled(signed({"a": 1}, SigningKey.generate())[1]), id="other key"
        ),
        pytest.param(
            {"a": 1},
            DIGEST,
            spelled(KEY.sign(canonical_json({"a": 1})).signature),
            id="over the text, not its digest",
        ),
    ],
)
def test_any_other_signature_is_refused(value: Any, digest: str, signature: str) -> None:
    with pytest.raises(BadSignature):
        RunnerKey.parse(TEXT).verify(value, digest, signature)
