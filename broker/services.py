"""Everything a request may need, opened once in `server.open_services` and handed down."""

from dataclasses import dataclass

from broker.admin.admin_tokens import TokenAdmin
from broker.admin.explain import Explain
from broker.admin.model_needs import ModelNeeds
from broker.admin.moderation import Moderation
from broker.admin.pauses import Pauses
from broker.admin.queue_tally import QueueTally
from broker.admin.results import Results
from broker.admin.runner_keys import Allowlist
from broker.admin.runner_tokens import RunnerTokens
from broker.admin.runners import RunnerAdmin
from broker.admin.runs import QueueView
from broker.audit.log import AuditLog
from broker.concurrency.shares import RunnerShares
from broker.concurrency.supervision import Supervisor
from broker.health import Health
from broker.in_flight import InFlight
from broker.jobs.enqueue import Enqueue
from broker.leases.cadence import Cadence
from broker.leases.claims import Claims
from broker.leases.heartbeats import Heartbeats
from broker.leases.releases import LeaseReleases
from broker.reload import Reload
from broker.results.receipts import Receipts
from broker.results.submissions import Submissions
from broker.runners.credentials import Credentials
from broker.runners.liveness import Liveness
from broker.runners.registration import Registry
from broker.runners.shared_rates import SharedRates
from broker.telemetry import Telemetry
from config.settings import Settings


@dataclass(frozen=True, slots=True)
class Services:
    """The verbs of the broker, as the handlers are given them."""

    settings: Settings
    credentials: Credentials
    registry: Registry
    cadence: Cadence
    claims: Claims
    heartbeats: Heartbeats
    releases: LeaseReleases
    submissions: Submissions
    allowlist: Allowlist
    enqueue: Enqueue
    queue: QueueView
    explain: Explain
    pauses: Pauses
    results: Results
    moderation: Moderation
    model_needs: ModelNeeds
    health: Health
    in_flight: InFlight
    liveness: Liveness
    runner_admin: RunnerAdmin
    runner_tokens: RunnerTokens
    shares: RunnerShares
    shared_rates: SharedRates
    tokens: TokenAdmin
    audit: AuditLog
    receipts: Receipts
    reload: Reload
    telemetry: Telemetry
    tally: QueueTally
    supervisor: Supervisor
    version: str
