"""Settings: where they come from, which ones are refused, and that no secret is ever shown."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from config.key_rings import parse_key_ring, parse_seed_ring
from config.read_errors import describe_read_error
from config.settings import (
    CONFIG_VARIABLE,
    PREFIX,
    Settings,
    SettingsRefused,
    load_settings,
)
from server import ServerRefused, open_services

SECRET, OTHER = "s" * 32, "t" * 32
SEED = "5e" * 32


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as environment:
        for name in Settings.model_fields:
            environment.delenv(PREFIX + name.upper(), raising=False)
            environment.delenv(f"{PREFIX}{name.upper()}_FILE", raising=False)
        environment.delenv(CONFIG_VARIABLE, raising=False)
        yield


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_defaults_are_the_designs() -> None:
    settings = load_settings()
    assert (settings.lease_ttl_s, settings.heartbeat_interval_s) == (300, 30)
    assert (settings.claim_wait_max_s, settings.max_runtime_s) == (50, 86_400)
    assert (settings.token_ttl_s, settings.clock_skew_s, settings.max_leases) == (900, 300, 1)
    assert (settings.sweep_interval_s, settings.sweep_degraded_s) == (5, 1)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load_settings().lease_ttl_s = 1  # type: ignore[misc]


def test_the_sources_win_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "queue: {database_url: y, public_url: http://y, log_level: debug, listen_port: 1}"
    monkeypatch.setenv(CONFIG_VARIABLE, write(tmp_path / "config.yaml", text))
    held = {"DATABASE_URL": "postgres://2", "PUBLIC_URL": "http://2", "LISTEN_PORT": "2"}
    for name, value in held.items():
        monkeypatch.setenv(f"{PREFIX}{name}_FILE", write(tmp_path / name, f"{value}\n"))
    for name, value in {"PUBLIC_URL": "http://3", "LISTEN_PORT": "3"}.items():
        monkeypatch.setenv(PREFIX + name, value)
    settings = load_settings(listen_port=4)
    assert settings.listen_port == 4
    assert settings.public_url == "http://3"
    assert settings.database_url.get_secret_value() == "postgres://2"
    assert settings.log_level == "debug"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("LEASE_TTL", "LEASE_TTL_S"),
        ("LISTEN_ADDRESs", "LISTEN_ADDRESS"),
        ("TOKEN_KEY_FILE", "TOKEN_KEYS_FILE"),
    ],
)
def test_a_mistyped_variable_is_refused_with_the_one_that_was_meant(
    monkeypatch: pytest.MonkeyPatch, name: str, hint: str
) -> None:
    monkeypatch.setenv(PREFIX + name, "1")
    with pytest.raises(SettingsRefused) as refused:
        load_settings()
    assert str(refused.value) == f"{PREFIX}{name}: no such setting; did you mean {PREFIX}{hint}?"


def test_every_mistyped_variable_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}LISTEN_PROT", "1")
    monkeypatch.setenv(f"{PREFIX}ZZZ", "1")
    with pytest.raises(SettingsRefused) as refused:
        load_settings()
    assert len(str(refused.value).splitlines()) == 2


def test_a_name_is_like_another_by_what_comes_after_the_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(f"{PREFIX}NOPE", "1")
    with pytest.raises(SettingsRefused, match=f"^{PREFIX}NOPE: no such setting$"):
        load_settings()


def test_each_thing_wrong_has_a_line_whatever_else_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(f"{PREFIX}NOPE", "1")
    monkeypatch.setenv(f"{PREFIX}LISTEN_PORT", "99999")
    for name in ("TOKEN_KEYS", "DATABASE_LISTEN_URL", "TRUSTED_ROOT", "DRAIN_S"):
        monkeypatch.setenv(f"{PREFIX}{name}_FILE", str(tmp_path / "missing"))
    (tmp_path / "binary").write_bytes(b"\xff")
    monkeypatch.setenv(f"{PREFIX}RECEIPT_KEYS_FILE", str(tmp_path / "binary"))
    with pytest.raises(SettingsRefused) as refused:
        load_settings()
    lines = str(refused.value).splitlines()
    names = [line.removeprefix(PREFIX).partition(":")[0] for line in lines]
    assert sorted(names) == [
        "DATABASE_LISTEN_URL_FILE", "DRAIN_S_FILE", "LISTEN_PORT", "NOPE", "RECEIPT_KEYS_FILE",
        "TOKEN_KEYS_FILE", "TRUSTED_ROOT_FILE",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["k1: [%SECRET%", "k1:SECRET: @x", "k1: !!x {SECRET", "\xff"])
def test_a_file_that_is_no_yaml_is_not_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, "latin-1")
    monkeypatch.setenv(CONFIG_VARIABLE, str(path))
    with pytest.raises(SettingsRefused, match=CONFIG_VARIABLE) as refused:
        load_settings()
    assert "SECRET" not in str(refused.value)


def test_what_the_command_line_reads_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}URL", "http://127.0.0.1")
    monkeypatch.setenv(f"{PREFIX}TOKEN", "t")
    load_settings()


def test_a_file_holds_a_value_without_its_last_newline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(tmp_path / "ring", f"one:{SECRET}\n")
    monkeypatch.setenv(f"{PREFIX}TOKEN_KEYS_FILE", path)
    assert load_settings().token_ring == {"one": SECRET.encode()}


def test_a_file_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "missing"
    monkeypatch.setenv(f"{PREFIX}TOKEN_KEYS_FILE", str(path))
    with pytest.raises(SettingsRefused, match=r"TOKEN_KEYS_FILE: cannot read .*missing: No"):
        load_settings()


def test_a_setting_whose_own_name_ends_in_file_is_no_file_of_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(tmp_path / "signers.yaml", "x: y")
    monkeypatch.setenv(f"{PREFIX}SIGNERS_FILE", path)
    assert load_settings().signers_file == Path(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("queue: {lease_ttl: 5}", "lease_ttl: no such setting; did you mean lease_ttl_s?"),
        ("queue: [1]", "must hold the settings by name"),
        ("- queue", "must hold the settings by name"),
        ("queue: {a: ", "not YAML"),
        ("queue: {listen_port: many}", f"{PREFIX}LISTEN_PORT: "),
        ("queue:\n  drain_s: 1\n  drain_s: 2", "line 3: a key appears twice"),
        ("queue:\n  drain_s: .inf", "line 2: a value that JSON cannot say"),
        ("[" * 5000, "config.yaml: "),
    ],
)
def test_a_yaml_section_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, message: str
) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, write(tmp_path / "config.yaml", text))
    with pytest.raises(SettingsRefused) as refused:
        load_settings()
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "run: {seed: 7}", "queue: {}"])
def test_a_yaml_file_need_not_speak_of_the_queue(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, write(tmp_path / "config.yaml", text))
    assert load_settings().lease_ttl_s == 300


def test_one_lost_heartbeat_must_not_cost_a_lease() -> None:
    assert load_settings(lease_ttl_s=90, heartbeat_interval_s=30).lease_ttl_s == 90
    with pytest.raises(SettingsRefused, match=r"lease_ttl_s \(89\) must be at least 3 x"):
        load_settings(lease_ttl_s=89, heartbeat_interval_s=30)


def test_lease_keys_and_revocations_live_in_different_databases() -> None:
    with pytest.raises(SettingsRefused, match="must name different logical databases"):
        load_settings(redis_lease_url="redis://h/1", redis_token_url="redis://h/1")


@pytest.mark.parametrize(
    "changes",
    [
        {"listen_port": 65536}, {"listen_port": -1}, {"max_leases": 0}, {"max_leases": 65},
        {"token_ttl_s": 29}, {"claim_wait_max_s": 301}, {"sweep_interval_s": 0},
        {"log_level": "loud"}, {"database_pool_max": 1}, {"lease_ttl_s": 10.5},
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused_by_name(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(SettingsRefused, match=f"^{PREFIX}{name.upper()}: "):
        load_settings(**changes)


def test_every_wrong_value_has_a_line() -> None:
    with pytest.raises(SettingsRefused) as refused:
        load_settings(listen_port=-1, max_leases=0)
    assert len(str(refused.value).splitlines()) == 2


def test_the_public_url_is_what_runners_sign_without_a_last_slash() -> None:
    assert load_settings(public_url="https://queue.example/").public_url == "https://queue.example"


@pytest.mark.parametrize(
    "url",
    [
        "", "foo", "//h", "ftp://h", "https://", "https:///path", "https://u:p@h", "https://@h",
        "https://h?x=1", "https://h?", "https://h#x", "https://h,i", "https://h:99999",
        "https://h:", "https://h x", "https://h\n", "https://:80",
    ],
)  # fmt: skip
def test_a_public_url_that_is_no_plain_web_address_is_refused_with_the_fix(url: str) -> None:
    with pytest.raises(SettingsRefused, match=f"^{PREFIX}PUBLIC_URL: .*https://queue.example.org$"):
        load_settings(public_url=url)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8400", "https://[::1]:8400", "https://queue.example.org/base/path"]
)
def test_a_public_url_may_have_a_port_and_a_path(url: str) -> None:
    assert load_settings(public_url=url).public_url == url


def test_a_listen_address_is_an_address_or_a_name() -> None:
    for good in ("", "0.0.0.0", "::", "fe80::1%eth0", "localhost", "gpu-1.example"):  # noqa: S104
        assert load_settings(listen_address=good).listen_address == good
    for bad in ("http://0.0.0.0", "127.0.0.1:80", "[::1]", "a b", "a/b"):
        with pytest.raises(SettingsRefused, match=f"^{PREFIX}LISTEN_ADDRESS: .*LISTEN_PORT"):
            load_settings(listen_address=bad)


def test_the_first_key_of_the_ring_is_the_signing_one() -> None:
    ring = parse_key_ring(SecretStr(f"new:{SECRET}, old:{OTHER},"))
    assert list(ring.items()) == [("new", SECRET.encode()), ("old", OTHER.encode())]


@pytest.mark.parametrize(
    ("ring", "message"),
    [
        (f"{SECRET}", "entry 1 is not of the form kid:secret"),
        (f"a:{SECRET},:{OTHER}", "entry 2 is not of the form kid:secret"),
        ("a:" + "s" * 31, "the secret of a is shorter than 32 bytes"),
        (f"a:{SECRET},a:{OTHER}", "the kid a appears twice"),
    ],
)
def test_a_key_ring_that_would_be_weak_or_ambiguous_is_refused_unseen(
    ring: str, message: str
) -> None:
    with pytest.raises(SettingsRefused) as refused:
        load_settings(token_keys=SecretStr(ring))
    assert message in str(refused.value)
    assert "sss" not in str(refused.value)
    assert "ttt" not in str(refused.value)


def test_the_first_receipt_key_is_the_signing_one() -> None:
    ring = parse_seed_ring(SecretStr(f"new:{SEED}, old:{SEED.upper()[::-1]}"))
    assert list(ring) == ["new", "old"]
    assert ring["new"] == bytes.fromhex(SEED)


@pytest.mark.parametrize(
    ("ring", "message"),
    [
        (f"{SEED}", "receipt_keys: entry 1 is not of the form kid:secret"),
        (f"a:{SEED[:-2]}", "the seed of a is not 32 bytes in hex"),
        (f"a:{SEED}00", "the seed of a is not 32 bytes in hex"),
        ("a:" + "xy" * 32, "the seed of a is not 32 bytes in hex"),
        (f"a:{SEED[:-1]}\u0663", "the seed of a is not 32 bytes in hex"),
        (f"a:{SEED},a:{SEED}", "receipt_keys: the kid a appears twice"),
    ],
)
def test_a_ring_of_receipt_keys_that_are_none_is_refused_unseen(ring: str, message: str) -> None:
    with pytest.raises(SettingsRefused) as refused:
        load_settings(receipt_keys=SecretStr(ring))
    assert message in str(refused.value)
    assert SEED[:-2] not in str(refused.value)


@pytest.mark.gen_test
async def test_the_server_does_not_start_without_its_key_rings() -> None:
    receipts, tokens = SecretStr(f"a:{SEED}"), SecretStr(f"a:{SECRET}")
    for settings, missing in (
        (load_settings(receipt_keys=receipts), "TOKEN_KEYS"),
        (load_settings(token_keys=tokens), "RECEIPT_KEYS"),
    ):
        with pytest.raises(ServerRefused, match=f"^{PREFIX}{missing} is not set.*openssl"):
            async with open_services(settings):
                pytest.fail("it started")


def test_no_secret_is_ever_shown() -> None:
    settings = load_settings(
        database_url=SecretStr("postgres://queue:hunter2@db/bakeoff"),
        token_keys=SecretStr(f"a:{SECRET}"),
        receipt_keys=SecretStr(f"a:{SEED}"),
    )
    shown = f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert SECRET not in shown
    assert SEED not in shown
    assert "hunter2" not in shown


def test_a_file_of_another_user_is_refused_with_the_uid_and_the_fix() -> None:
    reason = describe_read_error(PermissionError(errno.EACCES, "Permission denied"))
    assert f"Permission denied for uid {os.geteuid()}" in reason
    assert "LoadCredential=" in reason
