"""Runner tokens: which ones are ours, and that none outlives its revocation."""

import asyncio
import base64
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import jwt
import pytest
import redis.asyncio
from structlog.testing import capture_logs

from auth.errors import InvalidToken, TokenExpired
from auth.tokens import LEEWAY, RunnerIdentity, Tokens
from broker.concurrency import ttl_cache
from broker.runners import revocations as revocation
from config.settings import Settings
from sandbox.services import servers
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Runner, code_of, open_fleet

MakeSettings = Callable[..., Settings]
SECRET, OLD_SECRET = b"k" * 32, b"o" * 32
TTL = timedelta(seconds=900)
INSTANCE = uuid4()
TOKENS = Tokens({"test": SECRET, "old": OLD_SECRET}, TTL)
ME = "/api/runners/me"


def claims_of(**changes: Any) -> dict[str, Any]:
    """Return a good token's claims, with changes; None removes one."""
    now = int(datetime.now(UTC).timestamp())
    claims = {
        "iss": "bakeoff-queue", "aud": "runner", "sub": "runner-a", "jti": str(uuid4()),
        "iat": now, "nbf": now, "exp": now + 900, "key_fp": "f" * 64,
        "ins": str(INSTANCE), **changes,
    }  # fmt: skip
    return {name: value for name, value in claims.items() if value is not None}


def signed(
    claims: dict[str, Any] | None = None,
    *,
    secret: bytes = SECRET,
    algorithm: str = "HS256",
    **header: Any,
) -> str:
    """Return a token of these claims."""
    headers = {"kid": "test", **header}
    return jwt.encode(claims or claims_of(), secret, algorithm=algorithm, headers=headers)


def part(value: Any) -> str:
    """Return a part of a compact JWT."""
    text = value if isinstance(value, str) else json.dumps(value)
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def in_s(seconds: int) -> int:
    """Return the time in so many seconds."""
    return int(datetime.now(UTC).timestamp()) + seconds


def test_the_same_arguments_give_the_same_token_and_it_says_them() -> None:
    jti, now = uuid4(), datetime.now(UTC).replace(microsecond=0)
    token = TOKENS.mint("runner-a", "f" * 64, INSTANCE, jti, now)
    assert token == TOKENS.mint("runner-a", "f" * 64, INSTANCE, jti, now)
    assert TOKENS.read(token) == RunnerIdentity("runner-a", "f" * 64, INSTANCE, jti, now + TTL)
    assert jwt.get_unverified_header(token)["kid"] == "test"


def test_the_first_key_of_the_ring_signs_and_the_others_still_verify() -> None:
    TOKENS.read(signed(secret=OLD_SECRET, kid="old"))
    with pytest.raises(InvalidToken):
        TOKENS.read(signed(secret=OLD_SECRET, kid="test"))
    rotated = Tokens({"new": b"n" * 32, "test": SECRET}, TTL)
    assert (
        rotated.read(TOKENS.mint("a", "f", INSTANCE, uuid4(), datetime.now(UTC))).runner_id == "a"
    )


LEEWAY_S = int(LEEWAY.total_seconds())


@pytest.mark.parametrize("apart_s", [-LEEWAY_S + 1, -2, 0, 2, LEEWAY_S - 1])
def test_a_token_of_a_machine_whose_clock_differs_is_taken_new_and_old(apart_s: int) -> None:
    now = datetime.now(UTC) + timedelta(seconds=apart_s)
    TOKENS.read(TOKENS.mint("runner-a", "f", INSTANCE, uuid4(), now))
    TOKENS.read(TOKENS.mint("runner-a", "f", INSTANCE, uuid4(), now - TTL + timedelta(seconds=1)))


def test_a_token_lives_no_longer_than_promised_and_the_leeway() -> None:
    begin = in_s(-900 - LEEWAY_S)
    TOKENS.read(signed(claims_of(iat=begin + 2, nbf=begin + 2, exp=begin + 902)))
    with pytest.raises(TokenExpired):
        TOKENS.read(signed(claims_of(iat=begin, nbf=begin, exp=begin + 900)))
    longest = claims_of(exp=in_s(900 + LEEWAY_S))
    with pytest.raises(InvalidToken):
        TOKENS.read(signed(longest))


@pytest.mark.parametrize("name", ["iat", "nbf"])
def test_clocks_too_far_apart_are_told_as_such_and_not_as_a_bad_token(name: str) -> None:
    with capture_logs() as logs, pytest.raises(InvalidToken, match="clocks of this service's"):
        TOKENS.read(signed(claims_of(**{name: in_s(LEEWAY_S + 2)})))
    assert [line["event"] for line in logs] == ["tokens.from_the_future"]


def bad_claims() -> dict[str, dict[str, Any]]:
    """Return what is wrong with a token, as changes to good claims of this moment."""
    return {
        "other issuer": {"iss": "somebody"},
        "audience admin": {"aud": "admin"},
        "audience as a list": {"aud": ["runner"]},
        "audiences": {"aud": ["runner", "admin"]},
        "not yet": {"nbf": in_s(600)},
        "issued in the future": {"iat": in_s(600)},
        "exp as text": {"exp": str(in_s(600))},
        "exp as a float": {"exp": in_s(600) + 0.5},
        "exp far beyond": {"exp": 10**400},
        "exp infinite": {"exp": float("inf")},
        "life longer than ours": {"exp": in_s(910)},
        "jti no uuid": {"jti": "../../etc"},
        "jti number": {"jti": 7},
        "sub number": {"sub": 7},
        "key_fp number": {"key_fp": 7},
        "ins number": {"ins": 7},
        "ins no uuid": {"ins": "a"},
        **{f"no {name}": {name: None} for name in claims_of()},
    }


@pytest.mark.parametrize("wrong", bad_claims())
def test_every_claim_is_required_and_checked_though_our_key_signed_it(wrong: str) -> None:
    with pytest.raises(InvalidToken):
        TOKENS.read(signed(claims_of(**bad_claims()[wrong])))


GOOD = signed()
HEAD, BODY, TAIL = GOOD.split(".")
DEEP = "[" * 1100
DEEP_KID = '{"alg":"HS256","kid":' + DEEP
BAD_TOKENS: dict[str, str] = {
    "alg none": f"{part({'alg': 'none', 'kid': 'test'})}.{BODY}.",
    "alg none, signed": f"{part({'alg': 'none', 'kid': 'test'})}.{BODY}.{TAIL}",
    "alg HS384": signed(secret=b"k" * 48, algorithm="HS384"),
    "alg HS512": signed(secret=b"k" * 64, algorithm="HS512"),
    "alg RS256": f"{part({'alg': 'RS256', 'kid': 'test'})}.{BODY}.{TAIL}",
    "no alg": f"{part({'kid': 'test'})}.{BODY}.{TAIL}",
    "no kid": jwt.encode(claims_of(), SECRET, algorithm="HS256"),
    "unknown kid": signed(kid="other"),
    "kid as a path": signed(kid="../../dev/null"),
    "kid as a number": f"{part({'alg': 'HS256', 'kid': 7})}.{BODY}.{TAIL}",
    "kid as a list": f"{part({'alg': 'HS256', 'kid': ['test']})}.{BODY}.{TAIL}",
    "crit": signed(crit=["exp"]),
    "b64 false": f"{part({'alg': 'HS256', 'kid': 'test', 'b64': False})}.{BODY}.{TAIL}",
    "other secret": signed(secret=b"x" * 32),
    "no signature": f"{HEAD}.{BODY}.",
    "two parts": f"{HEAD}.{BODY}",
    "four parts": f"{GOOD}.{TAIL}",
    "padding": f"{GOOD}=",
    "space": f"{GOOD} ",
    "newline": f"{GOOD}\n",
    "not ASCII": "ä" + GOOD[1:],
    "header no JSON": f"{part('{')}.{BODY}.{TAIL}",
    "header a list": f"{part([1])}.{BODY}.{TAIL}",
    "header deeply nested": f"{part(DEEP)}.{BODY}.{TAIL}",
    "header a deeply nested kid": f"{part(DEEP_KID)}.{BODY}.{TAIL}",
    "longer than any of ours": signed(claims_of(extra="x" * 2000)),
    "empty": "",
}


@pytest.mark.parametrize("token", BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_what_is_no_token_of_ours_is_refused_and_nothing_else_happens(token: str) -> None:
    with pytest.raises(InvalidToken):
        TOKENS.read(token)


async def me(runner: Runner, *tokens: str) -> httpx.Response:
    """Ask who am I, with these Authorization headers."""
    return await runner.fleet.http.get(ME, headers=[("Authorization", each) for each in tokens])


@pytest.mark.gen_test
async def test_exactly_one_bearer_token_gets_in(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        good = f"Bearer {runner.token}"
        for headers in ((), ("",), ("Bearer",), (f"Basic {runner.token}",), (good, good)):
            answer = await me(runner, *headers)
            assert code_of(answer) == (401, "missing_token")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert code_of(await me(runner, good + "x")) == (401, "invalid_token")
        assert code_of(await me(runner, f"Bearer {fleet.admin_token}")) == (401, "invalid_token")
        answer = await me(runner, f"bearer {runner.token}")
        assert answer.status_code == 200
        assert answer.json()["runner_id"] == "runner-a"
        assert answer.json()["key_fingerprint"] == runner.fingerprint
        assert (answer.json()["paused"], answer.json()["held_leases"]) == (False, [])
        on_admin_route = await fleet.http.get("/api/admin/queue", headers=runner.headers)
        assert code_of(on_admin_route) == (401, "invalid_token")


@pytest.mark.gen_test
async def test_the_credential_is_checked_before_the_body_is_read(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        answer = await fleet.http.post("/api/queue/claim", content=b"x" * 100_000)
        assert code_of(answer) == (401, "missing_token")


@pytest.mark.gen_test
async def test_an_expired_token_is_renewed_and_the_lease_goes_on(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings()
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        job = await runner.take()
        tokens = Tokens(settings.token_ring, timedelta(seconds=settings.token_ttl_s))
        past = datetime.now(UTC) - timedelta(seconds=settings.token_ttl_s) - LEEWAY
        runner.token = tokens.mint("runner-a", runner.fingerprint, INSTANCE, uuid4(), past)
        assert code_of(await runner.heartbeat(job)) == (401, "token_expired")
        assert (await runner.register()).status_code == 200
        assert (await runner.heartbeat(job)).status_code == 200


@pytest.mark.gen_test
async def test_a_token_that_the_leeway_alone_keeps_alive_can_be_revoked_all_the_same(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ttl_cache, "REMEMBERED_S", 0)
    settings = make_settings()
    async with (
        open_fleet(settings, sigstore) as fleet,
        redis.asyncio.from_url(settings.redis_token_url) as client,
    ):
        runner = await fleet.sign_on()
        tokens = Tokens(settings.token_ring, timedelta(seconds=settings.token_ttl_s))
        past = datetime.now(UTC) - timedelta(seconds=settings.token_ttl_s + 2)
        old, other = (
            tokens.mint("runner-a", runner.fingerprint, INSTANCE, uuid4(), past) for _ in "ab"
        )
        for token in (old, other):  # the second one's revocation forgets what is past
            assert (await me(runner, f"Bearer {token}")).status_code == 200
            gone = await fleet.http.delete(ME, headers={"Authorization": f"Bearer {token}"})
            assert gone.status_code == 200
        await client.flushall()
        for token in (old, other):
            answer = await me(runner, f"Bearer {token}")
            assert code_of(answer) == (401, "invalid_token")
            assert "revoked" in answer.json()["detail"]


@pytest.mark.gen_test
async def test_a_flushed_redis_does_not_unrevoke(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ttl_cache, "REMEMBERED_S", 0)
    settings = make_settings()
    async with (
        open_fleet(settings, sigstore) as fleet,
        redis.asyncio.from_url(settings.redis_token_url) as client,
    ):
        gone, revoked = await fleet.sign_on(), await fleet.sign_on("runner-b")
        jti = jwt.decode(gone.token, options={"verify_signature": False})["jti"]
        assert (await fleet.http.delete(ME, headers=gone.headers)).status_code == 200
        await fleet.revoke(revoked)
        for _ in range(2):
            assert code_of(await me(gone, f"Bearer {gone.token}")) == (401, "invalid_token")
            assert code_of(await me(revoked, f"Bearer {revoked.token}")) == (403, "key_revoked")
            await fleet.services.credentials.settle()
            for name in (f"revoked:jti:{jti}", f"revoked:key:{revoked.fingerprint}"):
                # For as long as any machine takes the token, whatever its clock.
                left_s = await client.ttl(name) - settings.token_ttl_s
                assert LEEWAY_S < left_s <= 2 * LEEWAY_S, name
            await client.flushall()
        assert code_of(await me(gone, f"Bearer {gone.token}=")) == (401, "invalid_token")


@pytest.mark.gen_test
async def test_a_revocation_that_redis_alone_was_told_of_by_another_process_is_seen(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ttl_cache, "REMEMBERED_S", 0)
    settings = make_settings()
    async with open_fleet(settings, sigstore) as fleet, open_fleet(settings, sigstore) as second:
        runner = await fleet.sign_on()
        elsewhere = runner.at(second)
        assert (await me(elsewhere, f"Bearer {runner.token}")).status_code == 200
        await fleet.http.delete(ME, headers=runner.headers)
        assert code_of(await me(elsewhere, f"Bearer {runner.token}")) == (401, "invalid_token")


@pytest.mark.gen_test
async def test_without_redis_postgres_says_who_is_revoked(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ttl_cache, "REMEMBERED_S", 0)
    with servers.redis() as server:
        async with open_fleet(make_settings(redis_token_url=server.url(2)), sigstore) as fleet:
            good, gone = await fleet.sign_on(), await fleet.sign_on("runner-b")
            revoked = await fleet.sign_on("runner-c")
            await fleet.enqueue()
            server.kill()
            assert (await fleet.http.delete(ME, headers=gone.headers)).status_code == 200
            await fleet.revoke(revoked)
            job = await good.take()
            assert (await good.heartbeat(job)).status_code == 200
            assert code_of(await me(gone, f"Bearer {gone.token}")) == (401, "invalid_token")
            assert code_of(await me(revoked, f"Bearer {revoked.token}")) == (403, "key_revoked")


@pytest.mark.gen_test
async def test_an_answer_is_remembered_for_a_second_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[UUID] = []

    class RevocationSource:
        async def revoked_among(self, asked: Sequence[RunnerIdentity]) -> list[bool]:
            seen.extend(runner.jti for runner in asked)
            return [False] * len(asked)

        async def all_revocations(self) -> list[revocation.Revoked]:
            return []

    with servers.redis() as server:
        async with redis.asyncio.from_url(server.url(2)) as client:
            server.kill()
            revocations = revocation.Revocations(client, RevocationSource())
            runner = RunnerIdentity("a", "f" * 64, INSTANCE, uuid4(), datetime.now(UTC))
            assert revocations.remembered(runner) is None
            assert await revocations.revoked_among([runner]) == [False]
            assert revocations.remembered(runner) is False
            await revocations.write([])  # whoever revokes here forgets at once
            assert revocations.remembered(runner) is None
            await revocations.revoked_among([runner])
            monkeypatch.setattr(ttl_cache, "REMEMBERED_S", 0)
            assert revocations.remembered(runner) is None
            assert seen == [runner.jti] * 2
            await revocations.close()


@pytest.mark.gen_test
async def test_a_revocation_that_could_not_be_written_holds_when_redis_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Redis was away for a moment only, and still says that it holds every revocation."""
    monkeypatch.setattr(revocation, "AWAY_S", 0.01)
    back = asyncio.Event()
    claims = RunnerIdentity("a", "f" * 64, INSTANCE, uuid4(), datetime.now(UTC))
    gone = [revocation.Revoked(None, claims.jti, timedelta(minutes=1))]

    class Lossy(revocation.Revocations):
        away = True

        async def _write(self, revocations: Sequence[revocation.Revoked]) -> None:
            if self.away:
                self.away = False
                raise redis.asyncio.ConnectionError("away for this moment")
            await super()._write(revocations)

        async def _watch(self) -> None:
            await super()._watch()
            back.set()

    class RevocationSource:
        async def revoked_among(self, asked: Sequence[RunnerIdentity]) -> list[bool]:
            return [True] * len(asked)

        async def all_revocations(self) -> list[revocation.Revoked]:
            return gone

    with servers.redis() as server:
        async with redis.asyncio.from_url(server.url(2)) as client:
            await client.set(revocation.LOADED, 1)
            revocations = Lossy(client, RevocationSource())
            assert await revocations.revoked_among([claims]) == [False]
            await revocations.write(gone)
            assert await revocations.revoked_among([claims]) == [True]  # the authority says so
            await back.wait()
            assert await client.exists(revocation.token_name(claims.jti))
            assert await revocations.revoked_among([claims]) == [True]
            await revocations.close()


@pytest.mark.gen_test
async def test_a_redis_that_hangs_is_left_alone_until_it_answers_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the first look waits for it; a slow Redis must not slow every heartbeat."""
    monkeypatch.setattr(revocation, "AWAY_S", 0.01)
    looks: asyncio.Queue[int] = asyncio.Queue()
    back = asyncio.Event()

    class Spy(revocation.Revocations):
        async def _look(self, asked: Sequence[RunnerIdentity]) -> tuple[bool, list[bool]]:
            looks.put_nowait(len(asked))
            return await super()._look(asked)

        async def _watch(self) -> None:
            await super()._watch()
            back.set()

    class RevocationSource:
        async def revoked_among(self, asked: Sequence[RunnerIdentity]) -> list[bool]:
            return [True] * len(asked)  # Redis would say: False

        async def all_revocations(self) -> list[revocation.Revoked]:
            return []

    claims = [RunnerIdentity("a", "f" * 64, INSTANCE, uuid4(), datetime.now(UTC)) for _ in range(3)]
    with servers.redis() as server:
        async with redis.asyncio.from_url(server.url(2)) as client:
            await client.set("revoked:loaded", 1)
            revocations = Spy(client, RevocationSource())
            assert await revocations.revoked_among(claims) == [False] * 3
            assert looks.get_nowait() == 3
            server.pause()
            assert await revocations.revoked_among(claims[:2]) == [True] * 2
            assert looks.get_nowait() == 2
            assert await revocations.revoked_among(claims[:1]) == [True]
            assert await looks.get() == 0  # behind the answers, with nothing to ask
            server.resume()
            await back.wait()
            assert await revocations.revoked_among(claims[:1]) == [False]
            await revocations.close()
