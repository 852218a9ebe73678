"""Everything a request may need, opened once in `server.open_services` and handed down."""

from dataclasses import dataclass

from broker.allowlist import Allowlist
from broker.audit import AuditLog
from broker.claims import Claims
from broker.credentials import Credentials
from broker.enqueue import Enqueue
from broker.handbacks import Handbacks
from broker.health import Health
from broker.heartbeats import Heartbeats
from broker.in_flight import InFlight
from broker.liveness import Liveness
from broker.model_needs import ModelNeeds
from broker.moderation import Moderation
from broker.queue_tally import QueueTally
from broker.queue_view import QueueView
from broker.receipts import Receipts
from broker.registry import Registry
from broker.reload import Reload
from broker.results import Results
from broker.runner_care import RunnerCare
from broker.runner_tokens import RunnerTokens
from broker.shares import RunnerShares
from broker.submissions import Submissions
from broker.supervision import Supervisor
from broker.telemetry import Telemetry
from broker.token_admin import TokenAdmin
from config.settings import Settings


@dataclass(frozen=True, slots=True)
class Services:
    """The verbs of the broker, as the handlers are given them."""

    settings: Settings
    credentials: Credentials
    registry: Registry
    claims: Claims
    heartbeats: Heartbeats
    handbacks: Handbacks
    submissions: Submissions
    allowlist: Allowlist
    enqueue: Enqueue
    queue: QueueView
    results: Results
    moderation: Moderation
    model_needs: ModelNeeds
    health: Health
    in_flight: InFlight
    liveness: Liveness
    runner_care: RunnerCare
    runner_tokens: RunnerTokens
    shares: RunnerShares
    tokens: TokenAdmin
    audit: AuditLog
    receipts: Receipts
    reload: Reload
    telemetry: Telemetry
    tally: QueueTally
    supervisor: Supervisor
    version: str
