"""The storm's runners: they work, die, pause past the TTL, wake up, come late and come twice.

None of them is careful: what they hold they learn from answers, and a lost answer is lost. Each has
a random.Random of its own, derived from the storm's seed.
"""

import asyncio
import hashlib
import json
import random
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from nacl.signing import SigningKey

from sandbox.runner.identity import Identity
from sandbox.services.sigstore_instance import EmailSubject, ThrowawaySigstore
from tests.history.network import CALM, Answer, Network, Request, Weather
from tests.history.plans import TTL_S, Plan
from tests.support.result_factory import bundle_files, result_for

AUDIENCE = "http://queue.test"
SIGNER = EmailSubject("runner@bakeoff.test", "https://issuer.bakeoff.test")
CAPABILITIES = {"vram_gb": 24, "quantizations": ["q4_k_m", "q8_0"]}
JSON = ("Content-Type", "application/json")
BOUNDARY = "storm-7d1f0c52"
Job = dict[str, Any]


@dataclass
class Runner:
    """A machine: a name, a key, a token, and bad habits while the storm lasts."""

    name: str
    rng: random.Random
    plan: Plan
    network: Network
    sigstore: ThrowawaySigstore
    admit: Callable[["Runner"], Awaitable[None]]
    calm: asyncio.Event
    leases: int = 1
    key: SigningKey = field(init=False)
    token: str = ""

    def __post_init__(self) -> None:
        self.draw_key()

    @property
    def fingerprint(self) -> str:
        """How the allowlist names the key."""
        return hashlib.sha256(bytes(self.key.verify_key)).hexdigest()

    @property
    def weather(self) -> Weather:
        """What the network does to this runner now."""
        return CALM if self.calm.is_set() else self.plan.weather

    def draw_key(self) -> None:
        """Make a new key, from the runner's own randomness."""
        self.key = SigningKey(self.rng.randbytes(32))

    async def live(self) -> None:
        """Work until cancelled, on as many jobs at a time as the key allows."""
        await self.admit(self)
        await asyncio.gather(*(self._work_on(lane) for lane in range(self.leases)))

    async def _work_on(self, lane: int) -> None:
        while True:
            if not self.token:
                await self._register()
                continue
            key, answer = self.key, await self._claim()
            if self.key is not key:
                continue  # the other lane became somebody else meanwhile
            if answer is None or answer.status == 204:
                await asyncio.sleep(self.rng.uniform(0.02, 0.2))
            elif answer.status == 200:
                await self._treat(answer.body)
            else:
                await self._refused(answer)

    async def _refused(self, answer: Answer) -> None:
        """A claim was refused: a paused or revoked runner comes back as somebody else."""
        if answer.code in ("key_revoked", "runner_paused", "key_not_allowed"):
            self.draw_key()
            if answer.code == "runner_paused" or self.rng.random() < 0.5:
                self.name = f"{self.name.partition('.')[0]}.{self.rng.randrange(10**6)}"
            self.token = ""
            await self.admit(self)
        elif answer.status == 401:
            self.token = ""
        else:
            await asyncio.sleep(self.rng.uniform(0.1, 0.4))

    async def _treat(self, job: Job) -> None:
        """Do with a job what this runner does with jobs."""
        habits = {"work": 1.0} if self.calm.is_set() else self.plan.habits
        habit = self.rng.choices(list(habits), list(habits.values()))[0]
        await getattr(self, f"_{habit}")(job)

    async def _work(self, job: Job) -> None:
        if await self._beat_for(job, self.rng.uniform(*self.plan.work_s)):
            await self._submit(job)

    async def _submit_again(self, job: Job) -> None:
        """Submit, and then another result of the same run: 409, whatever happened."""
        await self._work(job)
        await self._submit(job)

    async def _die(self, job: Job) -> None:
        """Never be heard of again; another process takes the machine over."""
        await self._beat(job)
        await asyncio.sleep(self.rng.uniform(0, TTL_S))
        self.token = ""

    async def _pause(self, job: Job) -> None:
        """Stop past the deadline, wake up and go on as if nothing had happened."""
        await self._beat(job)
        await asyncio.sleep(TTL_S * self.rng.uniform(1.0, 2.2))
        for _ in range(self.rng.randrange(3)):
            await self._beat(job)
        await self._submit(job)

    async def _submit_late(self, job: Job) -> None:
        """Submit around the deadline of a lease that nobody renewed."""
        await self._beat(job)
        await asyncio.sleep(TTL_S + self.rng.uniform(-0.3, 1.0))
        await self._submit(job)

    async def _submit_silent(self, job: Job) -> None:
        """Submit without a single heartbeat: CLAIMED becomes COMPLETE."""
        await asyncio.sleep(self.rng.uniform(0, 0.3))
        await self._submit(job)

    async def _release(self, job: Job) -> None:
        await self._beat(job)
        await self._hand_back(job, "release", {"reason": "storm"})

    async def _fail(self, job: Job) -> None:
        await self._beat(job)
        code = self.rng.choice(("timeout", "infra_error", "load_failure", "oom", "unknown"))
        await self._hand_back(job, "fail", {"failure_code": code, "detail": "storm"})

    async def _sign_off(self, job: Job) -> None:
        """Leave, with a job in hand, and register again."""
        request = self._request("sign_off", "DELETE", "/api/runners/me", b"")
        await self.network.call(request, self.rng, self.weather)
        self.token = ""

    async def _beat_for(self, job: Job, seconds: float) -> bool:
        """Work on a job for so long; False when it is no longer ours to finish."""
        until = asyncio.get_running_loop().time() + seconds
        while True:
            answer = await self._beat(job)
            if answer is not None and answer.body.get("directive") == "cancel":
                await self._hand_back(job, "release", {"reason": "storm: cancelled"})
                return False
            # Some go on although they were told that the lease is lost.
            if answer is not None and answer.status >= 400 and self.rng.random() < 0.7:
                return False
            left = until - asyncio.get_running_loop().time()
            if left <= 0:
                return True
            await asyncio.sleep(min(left, 1.0))

    async def _register(self) -> None:
        identity = Identity(self.key, AUDIENCE, "storm.example", CAPABILITIES)
        body = identity.sign_registration()
        request = self._request("register", "POST", "/api/runners/register", body, JSON, token="")
        answer = await self.network.call(request, self.rng, self.weather)
        if self.key is not identity.key:
            return
        if answer is not None and answer.status in (200, 201):
            self.token = answer.body["access_token"]
        elif answer is not None:
            await self._refused(answer)
            await asyncio.sleep(0.05)

    async def _claim(self) -> Answer | None:
        key = str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        body = json.dumps({"wait_s": self.rng.choice((0, 0, 1, 2))}).encode()
        header = ("Idempotency-Key", key)
        request = self._request(
            "claim", "POST", "/api/queue/claim", body, JSON, header, claim_key=key
        )
        return await self.network.call(request, self.rng, self.weather)

    async def _beat(self, job: Job) -> Answer | None:
        progress = {"done": self.rng.randrange(5), "total": 5}
        return await self._post(job, "heartbeat", {"progress": progress}, tries=2)

    async def _hand_back(self, job: Job, verb: str, body: dict[str, Any]) -> None:
        await self._post(job, verb, body)

    async def _post(self, job: Job, verb: str, body: dict[str, Any], **limit: int) -> Answer | None:
        request = self._request(
            verb,
            "POST",
            f"/api/queue/{job['run_id']}/{verb}",
            json.dumps({"lease_id": job["lease_id"], **body}).encode(),
            JSON,
            run_id=job["run_id"],
            lease_id=job["lease_id"],
        )
        return await self.network.call(request, self.rng, self.weather, **limit)

    async def _submit(self, job: Job) -> Answer | None:
        files = self._bundle(job)
        header = ("Content-Type", f"multipart/form-data; boundary={BOUNDARY}")
        request = self._request(
            "submit",
            "POST",
            f"/api/queue/{job['run_id']}/submit",
            multipart(job["lease_id"], files),
            header,
            run_id=job["run_id"],
            lease_id=job["lease_id"],
            result_sha256=hashlib.sha256(files["result.json"]).hexdigest(),
        )
        return await self.network.call(request, self.rng, self.weather)

    def _bundle(self, job: Job) -> dict[str, bytes]:
        """Return a signed bundle whose digest no other one has."""
        result = result_for(job["run_id"], job)
        result["provenance"]["warnings"] = [f"storm {self.name} {self.rng.getrandbits(64)}"]
        unsigned = bundle_files(result, b"")
        return bundle_files(result, self.sigstore.sign(unsigned["result.json"], SIGNER))

    def _request(
        self,
        verb: str,
        method: str,
        path: str,
        body: bytes,
        *headers: tuple[str, str],
        token: str | None = None,
        **noted: str,
    ) -> Request:
        token = self.token if token is None else token
        if token:
            headers = (*headers, ("Authorization", f"Bearer {token}"))
        return Request(verb, self.name, self.fingerprint, method, path, headers, body, **noted)


def multipart(lease_id: str, files: dict[str, bytes]) -> bytes:
    """Return the body of a submit."""
    parts = [_part('name="lease_id"', lease_id.encode())]
    parts += [_part(f'name="{n}"; filename="{n}"', content) for n, content in files.items()]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def _part(disposition: str, content: bytes) -> bytes:
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n"
    return head.encode() + content + b"\r\n"
