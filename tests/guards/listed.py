"""Every guard, how it is removed, and the tests of which one must fail then.

A place is a file, and for SQL the query in it. The text to remove stands there once; a test of
`make test` holds that, so that the list cannot rot.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUEUE = "db/sql/run_queue.sql"
KEYS = "db/sql/runner_keys.sql"
RUNNERS = "db/sql/runners.sql"
TABLES = "db/migrations/20261123000002_queue.sql"
HEADS = "db/migrations/20261126000001_judges.sql"
ARCHIVE = "db/sql/archive.sql"
MIGRATE = "tests/service/test_migrations.py"
PRUNE = "db/sql/prune.sql"
RING_KEYS = "db/sql/key_rings.sql"

CLAIMS = "tests/service/test_claims.py"
KEY_RINGS = "tests/service/test_key_rings.py"
RACES = "tests/service/test_claim_races.py"
GUARDS = "tests/service/test_lease_guards.py"
EXPIRY = "tests/service/test_sweep.py"
STEERING = "tests/service/test_steering.py"
SUBMIT = "tests/service/test_submit.py"
ARCHIVED = "tests/service/test_archive.py"
PRUNED = "tests/service/test_prune.py"
ENQUEUE = "tests/service/test_enqueue_offloaded.py"
WORK = "tests/service/test_workers.py"
RELOAD = "tests/service/test_reload.py"
BUNDLES = "tests/unit/test_bundle.py"
DOCUMENTS = "tests/service/test_schemas.py"
AUTHORIZED = "tests/service/test_authorization.py"
_ANEW = (
    "tests/service/test_audit.py::"
    "test_a_chain_that_was_calculated_anew_is_caught_by_a_receipt_and_by_its_signed_heads"
)
_TAKEN = "tests/service/test_audit.py::test_every_lease_that_is_taken_from_somebody_leaves_a_row"
MATRIX = f"{AUTHORIZED}::test_every_credential_gets_what_the_matrix_says"
TOKENS = "tests/service/test_tokens.py"
ADMIN_TOKENS = "tests/service/test_admin_tokens.py"


@dataclass(frozen=True, slots=True)
class Guard:
    """A guard: its name, `file` or `file:query`, what is cut out or put in, the tests to run."""

    name: str
    place: str
    old: str
    new: str
    tests: str

    @property
    def file(self) -> str:
        """The file it stands in."""
        return self.place.partition(":")[0]


class NotThere(Exception):
    """The text of a guard does not stand exactly once where the list says."""


def without(guard: Guard) -> str:
    """Return the text of the guard's file, the guard removed. Raises NotThere.

    White space is not compared: a guard that was indented or wrapped anew is still found.
    """
    text = (ROOT / guard.file).read_text("utf-8")
    query = guard.place.partition(":")[2]
    start, end = (0, len(text)) if not query else _bounds(text, query)
    part = text[start:end]
    found = [*re.finditer(_pattern(guard.old), part)]
    if len(found) != 1:
        raise NotThere(f"{guard.name}: {len(found)} x in {guard.place}: {guard.old}")
    first, last = found[0].span()
    return text[:start] + part[:first] + guard.new + part[last:] + text[end:]


def _pattern(old: str) -> str:
    body = r"\s+".join(map(re.escape, old.split()))
    before = r"[ \t]*" if old[0] == " " else r"\s+" if old[0].isspace() else ""
    after = r"[ \t]*\n" if old[-1] == "\n" else r"\s+" if old[-1].isspace() else ""
    return before + body + after


def _bounds(text: str, query: str) -> tuple[int, int]:
    start = text.index(f"-- name: {query}\n")
    end = text.find("\n-- name: ", start + 1)
    return start, len(text) if end < 0 else end


ENQUEUED = (
    Guard(
        "enqueue: a run sent again has the same job",
        f"{QUEUE}:compared",
        "a.value IS DISTINCT FROM b.value",
        "false",
        f"{ENQUEUE}::test_what_is_sent_again_is_compared_run_by_run",
    ),
    Guard(
        "enqueue: a run sent again has the same model",
        f"{QUEUE}:compared",
        "WHERE q.model_id <> t.model_id",
        "WHERE false",
        f"{ENQUEUE}::test_what_is_sent_again_is_compared_run_by_run",
    ),
    Guard(
        "enqueue: runs of several statements keep their order",
        f"{QUEUE}:enqueue",
        "($11::int + t.place)",
        "($11::int * 0 + t.place)",
        f"{ENQUEUE}::test_rows_and_jobs_go_to_the_database_in_pieces_of_text",
    ),
)

PAUSES = (
    Guard(
        "pause: nothing that is paused is handed out",
        f"{QUEUE}:claim",
        """AND NOT EXISTS (
            SELECT FROM pauses AS p
            WHERE p.model_id IS NULL OR p.model_id IN (w.model_id, w.judge_model_id)
        )""",
        "",
        "tests/service/test_explain.py::test_a_pause_hands_out_nothing_until_it_is_resumed",
    ),
    Guard(
        "pause: it ends at its time",
        f"{QUEUE}:claim",
        "SELECT model_id FROM queue_pauses WHERE is_paused(paused_at, until)",
        "SELECT model_id FROM queue_pauses",
        "tests/service/test_explain.py::test_a_pause_ends_at_its_time",
    ),
    Guard(
        "pause: a resume wakes parked claims",
        f"{QUEUE}:resume",
        "SELECT was_paused, pg_notify('bakeoff_queue', '') FROM ended",
        "SELECT was_paused FROM ended",
        "tests/service/test_explain.py::"
        "test_a_resume_wakes_parked_claims_and_a_pause_of_another_model_holds_nobody",
    ),
    Guard(
        "bulk: another number than expected changes nothing",
        "broker/admin/runs.py",
        "if expected != matched:",
        "if False:",
        "tests/service/test_change_runs.py::"
        "test_runs_that_fit_a_filter_are_counted_first_and_then_changed_one_by_one",
    ),
    Guard(
        "set: only a PENDING run is changed",
        f"{QUEUE}:set",
        "AND status = 'PENDING'",
        "",
        "tests/service/test_change_runs.py::"
        "test_a_priority_and_an_earliest_start_are_set_while_a_run_is_pending",
    ),
)

RINGS = (
    Guard(
        "key rings: a kid that is another key is left as it is",
        f"{RING_KEYS}:hold",
        "WHERE k.fingerprint = excluded.fingerprint",
        "",
        f"{KEY_RINGS}::test_another_key_under_an_old_kid_stops_the_start_with_ring_kid_and_fix",
    ),
    Guard(
        "key rings: a key that nobody signs with is not missed",
        f"{RING_KEYS}:signing",
        "WHERE signed_at > statement_timestamp() - $1::interval",
        "WHERE $1::interval IS NOT NULL",
        f"{KEY_RINGS}::test_a_key_that_nobody_signs_with_any_more_is_not_missed",
    ),
    Guard(
        "key rings: a kid that a process has is not freed",
        "broker/admin/key_rings.py",
        'if row["held"]:',
        "if False:",
        f"{KEY_RINGS}::test_a_kid_is_freed_once_no_process_has_it_and_may_be_another_key_then",
    ),
    Guard(
        "key rings: a reload compares them first",
        "broker/reload.py",
        "            await self._key_rings.hold(settings)\n",
        "",
        f"{KEY_RINGS}::test_at_a_reload_another_key_under_an_old_kid_changes_nothing",
    ),
)

CLAIM = (
    Guard(
        "claim: a revoked key gets nothing",
        f"{QUEUE}:claim",
        "revoked_at IS NULL AND (not_after IS NULL OR",
        "(not_after IS NULL OR",
        f"{RACES}::test_a_claim_waits_for_a_revocation_in_flight_and_is_then_refused",
    ),
    Guard(
        "claim: a key whose time is over gets nothing",
        f"{QUEUE}:claim",
        "AND (not_after IS NULL OR not_after > clock_timestamp())",
        "",
        f"{CLAIMS}::test_a_paused_or_expired_key_gets_nothing",
    ),
    Guard(
        "claim: waits for a revocation in flight",
        f"{QUEUE}:claim",
        "    FOR SHARE\n",
        "",
        f"{RACES}::test_a_claim_waits_for_a_revocation_in_flight_and_is_then_refused",
    ),
    Guard(
        "claim: a token that was ended gets nothing",
        f"{QUEUE}:claim",
        " AND r.token <> all(k.ended_tokens)\n",
        "\n",
        f"{RACES}::test_a_claim_waits_for_a_sign_off_in_flight_and_is_then_refused",
    ),
    Guard(
        "claim: the end of a token stands in the key's row",
        f"{KEYS}:revoke_token",
        "WHERE fingerprint = $3 AND",
        "WHERE fingerprint <> $3 AND",
        f"{RACES}::test_a_claim_that_waits_in_another_process_gets_nothing_after_its_runner_signed_off",
    ),
    Guard(
        "sign-off: the token ends before the leases are looked at",
        "broker/runners/registration.py",
        "            await runner_keys.revoke_token(connection, runner.jti, runner.dead_at, key)\n",
        "",
        f"{RACES}::test_a_sign_off_waits_for_a_claim_in_flight_and_hands_its_lease_back",
    ),
    Guard(
        "claim: a lease is given again to a good key only",
        f"{QUEUE}:claim",
        "    FROM admitted AS r\n    CROSS JOIN",
        "    FROM requests AS r\n    CROSS JOIN",
        f"{RACES}::test_a_claim_sent_again_by_a_key_whose_time_is_over_does_not_get_its_lease",
    ),
    Guard(
        "claim: a lease is given again to its holder only",
        f"{QUEUE}:claim",
        "WHERE q.claimed_by = r.runner_id AND q.claim_key",
        "WHERE q.claim_key",
        f"{RACES}::test_the_same_idempotency_key_gives_the_same_lease_while_it_lives",
    ),
    Guard(
        "claim: only the same key is a claim sent again",
        f"{QUEUE}:claim",
        "r.runner_id AND q.claim_key = r.claim_key",
        "r.runner_id",
        f"{RACES}::test_a_runner_may_hold_as_many_leases_as_its_key_says",
    ),
    Guard(
        "claim: what is given again was not ended meanwhile",
        f"{QUEUE}:claim",
        " AND q.claimed_by = s.runner_id AND q.claim_key = s.claim_key",
        "",
        f"{RACES}::test_a_claim_sent_again_beside_the_undo_of_the_first_gets_a_new_lease",
    ),
    Guard(
        "claim: looks again when it was ended meanwhile",
        f"{QUEUE}:claim",
        "    OR (SELECT count(*) FROM replayed_leases) < (SELECT count(*) FROM replayed) AS",
        "    AS",
        f"{RACES}::test_a_claim_sent_again_beside_the_undo_of_the_first_gets_a_new_lease",
    ),
    Guard(
        "claim: an undo knows that the lease was given again",
        f"{QUEUE}:claim",
        "SET lease_instance = s.instance_id, updated_at = clock_timestamp()\n",
        "SET lease_instance = s.instance_id, updated_at = q.updated_at\n",
        f"{RACES}::test_an_undo_leaves_a_lease_that_another_answer_has_delivered",
    ),
    Guard(
        "claim: a paused runner gets nothing",
        f"{QUEUE}:claim",
        "AND NOT is_paused(u.paused_at, u.paused_until) AND u.drain",
        "AND u.drain",
        f"{STEERING}::test_a_runner_that_lapses_on_three_runs_in_a_row_is_paused",
    ),
    Guard(
        "claim: a pause ends when it was told to",
        f"{QUEUE}:claim",
        "AND NOT is_paused(u.paused_at, u.paused_until) AND u.drain",
        "AND u.paused_at IS NULL AND u.drain",
        f"{STEERING}::test_a_pause_may_end_by_itself",
    ),
    Guard(
        "claim: a draining runner gets nothing",
        f"{QUEUE}:claim",
        " AND u.drain_requested_at IS NULL",
        "",
        f"{STEERING}::test_a_draining_runner_is_told_so_and_gets_nothing_new_until_it_is_resumed",
    ),
    Guard(
        "claim: as many leases as the key says",
        f"{QUEUE}:claim",
        "generate_series(1, r.max_leases)",
        "generate_series(1, a.max_leases + 1)",
        f"{RACES}::test_a_runner_may_hold_as_many_leases_as_its_key_says",
    ),
    Guard(
        "claim: a slot is free when no lease has it",
        f"{QUEUE}:claim",
        "WHERE q.claimed_by = r.runner_id AND q.lease_slot = slot",
        "WHERE false",
        f"{RACES}::test_a_runner_may_hold_as_many_leases_as_its_key_says",
    ),
    Guard(
        "claim: one sent again takes nothing new",
        f"{QUEUE}:claim",
        "    WHERE r.place NOT IN (SELECT place FROM replayed)\n",
        "",
        f"{RACES}::test_an_undo_leaves_a_lease_that_another_answer_has_delivered",
    ),
    Guard(
        "claim: quantizations that the runner can run",
        f"{QUEUE}:claim",
        " AND f.quantization = any(k.quantizations)",
        "",
        f"{CLAIMS}::test_a_runner_gets_only_quantizations_it_can_run",
    ),
    Guard(
        "claim: VRAM that the runner has",
        f"{QUEUE}:claim",
        "f.need_gb <= k.vram_gb AND ",
        "",
        f"{CLAIMS}::test_a_model_that_needs_23_gb_fits_a_card_of_23_and_not_one_of_22",
    ),
    Guard(
        "claim: not a run that the runner failed and another could take",
        f"{QUEUE}:claim",
        " OR another_fits(f.run_id, r.runner_id)",
        "",
        "tests/service/test_releases.py::test_a_run_goes_to_another_that_fits_before_it_comes_back_to_who_failed_it",
    ),
    Guard(
        "claim: not before the time that the runner asked for",
        f"{QUEUE}:claim",
        "f.until > clock_timestamp() OR another_fits",
        "another_fits",
        "tests/service/test_releases.py::test_a_runners_wish_delays_the_run_for_that_runner_and_for_nobody_else",
    ),
    Guard(
        "claim: runners that avoid runs are a kind of their own",
        f"{QUEUE}:claim",
        "k.kind = e.kind AND k.avoided = e.avoided AND",
        "k.kind = e.kind AND",
        "tests/service/test_releases.py::test_a_runner_that_avoids_a_run_is_served_beside_one_of_the_same_kind_that_does_not",
    ),
    Guard(
        "requeue: for every runner",
        f"{QUEUE}:requeue",
        "DELETE FROM run_deferrals AS d USING put_back AS p WHERE d.run_id = p.run_id",
        "SELECT",
        "tests/service/test_releases.py::test_a_wish_ends_by_itself_and_by_a_requeue",
    ),
    Guard(
        "claim: not before retry_after",
        f"{QUEUE}:claim",
        "AND q.retry_after <= statement_timestamp()",
        "AND q.retry_after IS NOT NULL",
        f"{CLAIMS}::test_runs_behind_the_first_that_nobody_may_take_do_not_crowd_out_the_others",
    ),
    Guard(
        "claim: what has come due takes its place in the queue's order",
        f"{QUEUE}:promote_due",
        "retry_after <= statement_timestamp()",
        "false",
        f"{CLAIMS}::test_runs_that_have_come_due_take_their_place_in_the_queues_order",
    ),
    Guard(
        "claim: what is not due keeps its time",
        f"{QUEUE}:promote_due",
        "AND retry_after <= statement_timestamp()",
        "",
        f"{CLAIMS}::test_runs_that_have_come_due_take_their_place_in_the_queues_order",
    ),
    Guard(
        "claim: the run of a parked claim that is refused is the next one's",
        "broker/leases/claims.py",
        "self.parked.notify()  # the run that",
        "pass  # the run that",
        f"{RACES}::test_the_run_of_a_parked_claim_that_is_refused_goes_to_the_next_in_line",
    ),
    Guard(
        "claim: a draining runner does not wait before others",
        "broker/leases/claims.py",
        'or row["draining"] ',
        "",
        f"{RACES}::test_a_draining_runner_is_not_parked_where_it_would_be_woken_before_others",
    ),
    Guard(
        "claim: a ring between the look and the wait is heard",
        "broker/leases/parked_claims.py",
        "if self.generation != seen_generation:",
        "if False:",
        "tests/unit/test_parked_claims.py",
    ),
    Guard(
        "claim: the longest waiting is woken first",
        "broker/leases/parked_claims.py",
        "            (turn, self._woken.get(runner_id, 0), place)\n",
        "            (turn, self._woken.get(runner_id, 0), -place)\n",
        "tests/unit/test_parked_claims.py",
    ),
    Guard(
        "share: a runner's second claim comes behind the first of others",
        "broker/leases/parked_claims.py",
        "(turn, self._woken.get(runner_id, 0), place)",
        "(0, 0, place)",
        "tests/service/test_shares.py::test_parked_claims_of_one_runner_come_behind_the_first_of_another",
    ),
    Guard(
        "share: a claim that was woken in vain keeps its place",
        "broker/leases/parked_claims.py",
        "        insort(places, place)",
        "        places.append(place)",
        "tests/unit/test_parked_claims.py"
        "::test_a_claim_that_comes_back_goes_before_a_later_one_of_its_runner",
    ),
    Guard(
        "share: parked claims",
        "broker/leases/parked_claims.py",
        "        if len(places) > PARKED_MAX:\n            _tell(self._waiters[places[0]], False)\n",
        "",
        "tests/service/test_shares.py::test_of_a_runner_with_too_many_parked_claims_the_oldest_stops_waiting",
    ),
    Guard(
        "share: uploads",
        "broker/results/submissions.py",
        "if not self._shares.uploads.take(runner_id):",
        "if not self._shares.uploads.take(runner_id) and False:",
        "tests/service/test_shares.py::test_uploads_that_trickle_leave_room_for_those_of_another_runner",
    ),
    Guard(
        "share: verifications",
        "broker/results/submissions.py",
        "if not self._shares.verifications.take(runner_id):",
        "if not self._shares.verifications.take(runner_id) and False:",
        "tests/service/test_shares.py::test_verifications_of_one_runner_leave_room_for_those_of_another",
    ),
    Guard(
        "share: requests in flight",
        "handlers/runner_base.py",
        "        if not self.hold(self.services.shares.requests, runner_id):\n",
        "        if False:\n",
        "tests/service/test_shares.py::test_a_runner_has_so_many_requests_in_flight_and_no_more",
    ),
    Guard(
        "share: jobs given again",
        "handlers/queue.py",
        'self.facts["outcome"] = "replayed"\n            self.hold_replay()\n',
        'self.facts["outcome"] = "replayed"\n',
        "tests/service/test_shares.py::test_a_job_that_is_given_again_without_end_is_not_held_for_slow_readers",
    ),
    Guard(
        "rate: an address has one rate over all processes",
        "handlers/base.py",
        "if wait_s := await self.services.shared_rates.wait_s(client):",
        "if wait_s := 0:",
        "tests/service/test_rates.py::test_an_address_has_one_rate_over_all_processes",
    ),
    Guard(
        "rate: anonymous requests",
        "handlers/base.py",
        '        await self.limit(known.anonymous.take(client), "address")\n',
        "",
        "tests/service/test_rates.py::test_an_address_that_floods_is_refused_and_runners_and_admins_are_not",
    ),
    Guard(
        "rate: wrong admin tokens are refused before they are looked up",
        "handlers/admin_base.py",
        "            await self.throttle()\n",
        "            pass\n",
        "tests/service/test_rates.py::test_an_address_that_floods_is_refused_and_runners_and_admins_are_not",
    ),
    Guard(
        "rate: an admin's own token is not counted",
        "handlers/admin_base.py",
        "        if not self.services.credentials.was_good(token):\n",
        "        if True:\n",
        "tests/service/test_rates.py::test_an_address_that_floods_is_refused_and_runners_and_admins_are_not",
    ),
    Guard(
        "rate: a runner's requests",
        "handlers/runner_base.py",
        '        await self.limit(self.settings["rates"].runners.take(runner_id), "runner")\n',
        "",
        "tests/service/test_rates.py::test_a_runner_that_floods_is_refused_and_another_is_not",
    ),
    Guard(
        "rate: a refusal comes late",
        "handlers/base.py",
        "        await asyncio.sleep(rates.DELAY_S * random.uniform(1, 3))  # noqa: S311 (no secret)\n",
        "",
        "tests/service/test_rates.py::test_a_refusal_comes_late_so_that_a_flood_in_a_loop_is_slow",
    ),
    Guard(
        "claim: as many are woken as there are runs",
        "broker/leases/parked_claims.py",
        "left[i] -= 1",
        "pass",
        "tests/unit/test_parked_claims.py",
    ),
    Guard(
        "tokens: a Redis that hangs is left alone",
        "broker/runners/revocations.py",
        "if not self._away:\n            try:",
        "if True:\n            try:",
        "tests/service/test_tokens.py::test_a_redis_that_hangs_is_left_alone_until_it_answers_again",
    ),
    Guard(
        "claim: PENDING runs only",
        f"{QUEUE}:claim",
        "AND q.status = 'PENDING' AND q.job IS NOT NULL\n"
        "                        AND q.retry_after IS NULL",
        "AND q.job IS NOT NULL AND q.retry_after IS NULL",
        f"{CLAIMS}::test_runs_behind_the_first_that_nobody_may_take_do_not_crowd_out_the_others",
    ),
    Guard(
        "claim: what one kind of runner took is not another's",
        f"{QUEUE}:claim",
        "AND q.retry_after IS NULL AND q.queue_id <> all(r.taken || k.avoided)",
        "AND q.retry_after IS NULL AND q.queue_id <> all(k.avoided)",
        f"{RACES}::test_runners_of_many_kinds_are_served_together_and_no_run_goes_to_two",
    ),
    Guard(
        "claim: still PENDING once its lock is ours",
        f"{QUEUE}:claim",
        "q.status = 'PENDING' -- and not failed by another, and deferred, meanwhile\n",
        "true\n",
        f"{GUARDS}::test_a_run_that_was_claimed_while_this_claim_waited_is_not_claimed_again",
    ),
    Guard(
        "claim: not deferred since, once its lock is ours",
        f"{QUEUE}:claim",
        "AND (q.retry_after IS NULL OR q.retry_after <= statement_timestamp())",
        "",
        f"{GUARDS}::test_a_run_that_failed_while_a_claim_waited_keeps_its_time",
    ),
    Guard(
        "claim: bakeoff's own rows are not handed out",
        f"{QUEUE}:claim",
        "AND q.status = 'PENDING' AND q.job IS NOT NULL\n"
        "                        AND q.retry_after IS NULL",
        "AND q.status = 'PENDING' AND q.retry_after IS NULL",
        f"{CLAIMS}::test_runs_behind_the_first_that_nobody_may_take_do_not_crowd_out_the_others",
    ),
    Guard(
        "claim: a run that another claim takes is passed over",
        f"{QUEUE}:claim",
        "FOR UPDATE OF q SKIP LOCKED",
        "FOR UPDATE OF q NOWAIT",
        f"{RACES}::test_a_run_that_another_claim_takes_at_this_moment_is_passed_over",
    ),
    Guard(
        "claim: in the queue's order, models mixed",
        f"{QUEUE}:claim",
        "h.priority, CASE WHEN $11 THEN h.need_gb END DESC, h.created_at, h.queue_id",
        "h.queue_id",
        f"{CLAIMS}::test_lower_priority_numbers_go_first_and_then_the_oldest_run_of_any_model",
    ),
    Guard(
        "claim: the head of each model's queue, by priority and age",
        f"{QUEUE}:claim",
        "        ORDER BY q.priority, q.created_at, q.queue_id\n",
        "        ORDER BY q.queue_id\n",
        f"{CLAIMS}::test_the_best_of_many_runs_goes_first_wherever_it_lies",
    ),
    Guard(
        "claim: the best models: PENDING runs only",
        HEADS,
        "q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NULL\n            AND (q.model_id, q.judge_model_id) > (r",
        "q.job IS NOT NULL AND q.retry_after IS NULL\n            AND (q.model_id, q.judge_model_id) > (r",
        f"{CLAIMS}::test_of_more_models_than_are_looked_at_the_best_run_is_found",
    ),
    Guard(
        "claim: the best models: no row of bakeoff's own",
        HEADS,
        " AND q.job IS NOT NULL AND q.retry_after IS NULL\n            AND (q.model_id, q.judge_model_id) > (r",
        " AND q.retry_after IS NULL\n            AND (q.model_id, q.judge_model_id) > (r",
        f"{CLAIMS}::test_of_more_models_than_are_looked_at_the_best_run_is_found",
    ),
    Guard(
        "claim: the best models: not before retry_after",
        HEADS,
        " AND q.retry_after IS NULL\n            AND (q.model_id, q.judge_model_id) > (r",
        "\n            AND (q.model_id, q.judge_model_id) > (r",
        f"{CLAIMS}::test_of_more_models_than_are_looked_at_the_best_run_is_found",
    ),
    Guard(
        "claim: the best models: by priority and age",
        f"{QUEUE}:claim",
        "f.priority, CASE WHEN $11 THEN f.need_gb END DESC, f.created_at, f.queue_id",
        "f.queue_id",
        f"{CLAIMS}::test_of_more_models_than_are_looked_at_the_best_run_is_found",
    ),
    Guard(
        "claim: the best models: what another kind took does not crowd out the rest",
        f"{QUEUE}:claim",
        " + cardinality(r.taken)",
        "",
        f"{CLAIMS}::test_of_more_models_than_are_looked_at_the_best_that_another_kind_left_is_found",
    ),
    Guard(
        "claim: raises the fence",
        f"{QUEUE}:claim",
        "lease_seq = q.lease_seq + 1,",
        "lease_seq = q.lease_seq,",
        f"{CLAIMS}::test_the_next_runner_hears_how_earlier_attempts_ended",
    ),
    Guard(
        "claim: a new secret",
        f"{QUEUE}:claim",
        "lease_id = gen_random_uuid(),",
        "lease_id = coalesce(q.lease_id, gen_random_uuid()),",
        f"{SUBMIT}::test_a_result_that_is_late_is_lost_once_another_has_claimed_the_run"
        f" {SUBMIT}::test_an_old_lease_is_lost_when_the_same_runner_has_claimed_again",
    ),
    Guard(
        "claim: never beyond the longest runtime",
        f"{QUEUE}:claim",
        "+ least($8::interval, coalesce(q.max_runtime_s, $10) * interval '1 second')",
        "+ $8::interval",
        f"{CLAIMS}::test_a_lease_never_outlives_the_runs_longest_runtime",
    ),
    Guard(
        "claim: the loser of a race for rows looks again",
        f"{QUEUE}:claim",
        "WHERE cardinality(c.chosen) < least(k.asked, c.found)",
        "WHERE false",
        f"{GUARDS}::test_a_run_that_another_holds_for_a_moment_is_not_said_to_be_none",
    ),
    Guard(
        "claim: one key, one lease, in two processes",
        TABLES,
        "CREATE UNIQUE INDEX run_queue_claim_key",
        "CREATE INDEX run_queue_claim_key",
        f"{GUARDS}::test_two_claims_of_one_key_cannot_both_be_committed",
    ),
    Guard(
        "claim: max_leases holds in two processes",
        TABLES,
        "CREATE UNIQUE INDEX run_queue_lease_slot",
        "CREATE INDEX run_queue_lease_slot",
        f"{GUARDS}::test_the_loser_of_a_race_for_a_lease_slot_looks_again_and_is_at_the_limit",
    ),
    Guard(
        "claim: the loser of a race for a slot looks again",
        "broker/leases/claims.py",
        "            except asyncpg.UniqueViolationError:\n                continue\n",
        "            except asyncpg.UniqueViolationError:\n                raise\n",
        f"{GUARDS}::test_the_loser_of_a_race_for_a_lease_slot_looks_again_and_is_at_the_limit",
    ),
    Guard(
        "claim: another body under the same key is a conflict",
        "broker/leases/claims.py",
        'if row["claim_digest"] != claimant.claim_digest:',
        "if False:",
        f"{RACES}::test_the_same_idempotency_key_gives_the_same_lease_while_it_lives",
    ),
    Guard(
        "claim: undone when its runner hung up during the statement",
        "broker/leases/claims.py",
        "undelivered=self._undelivered",
        "undelivered=lambda row: None",
        f"{RACES}::test_a_claim_whose_runner_hung_up_during_the_statement_is_undone",
    ),
    Guard(
        "claim: a repeated answer undoes nothing",
        "broker/leases/claims.py",
        '        if row["granted_at"] is None:\n            return\n',
        "",
        f"{RACES}::test_an_undo_leaves_a_lease_that_another_answer_has_delivered",
    ),
    Guard(
        "claim: a runner that hung up stops waiting",
        "handlers/queue.py",
        "            self._claiming.cancel()\n",
        "            pass\n",
        f"{RACES}::test_a_parked_claim_whose_runner_hung_up_takes_no_run",
    ),
)

_GOOD_KEY = "k.fingerprint = $4 AND k.revoked_at IS NULL"
_RIGHT = f"{GUARDS}::test_the_run_the_secret_the_holder_and_the_key_must_all_be_right"
_GOOD = f"{GUARDS}::test_the_key_must_be_good_at_this_moment"
_LIVE = f"{GUARDS}::test_the_run_must_be_live_or_lapsed_for_its_result"
_LOCAL = f"{GUARDS}::test_rows_of_bakeoffs_own_local_runner_are_never_touched"
_LEDGER = f"{GUARDS}::test_each_end_closes_the_ledgers_row_of_its_own_lease_only"


def _held(verb: str) -> tuple[Guard, ...]:
    """The guard of a release and of a failure: run, secret, holder, state, key, ours, ledger."""
    place = f"{QUEUE}:{verb}"
    return (
        Guard(f"{verb}: this run", place, "q.run_id = $1 AND ", "", _RIGHT),
        Guard(
            f"{verb}: the secret",
            place,
            " AND q.lease_id = $2",
            " AND $2::uuid IS NOT NULL",
            _RIGHT,
        ),
        Guard(
            f"{verb}: the holder",
            place,
            " AND q.claimed_by = $3",
            " AND $3::text IS NOT NULL",
            _RIGHT,
        ),
        Guard(
            f"{verb}: a key of ours",
            place,
            _GOOD_KEY,
            "k.revoked_at IS NULL AND $4::text <> ''",
            _RIGHT,
        ),
        Guard(f"{verb}: a key not revoked", place, _GOOD_KEY, "k.fingerprint = $4", _GOOD),
        Guard(
            f"{verb}: a live lease",
            place,
            "        AND q.status IN ('CLAIMED', 'IN_PROGRESS')\n",
            "",
            _LIVE,
        ),
        Guard(
            f"{verb}: bakeoff's own rows stay",
            place,
            "= $1 AND q.job IS NOT NULL",
            "= $1",
            _LOCAL,
        ),
        Guard(
            f"{verb}: the ledger's row of this run", place, "a.run_id = h.run_id AND ", "", _LEDGER
        ),
        Guard(
            f"{verb}: the ledger's row of this lease",
            place,
            "\n    WHERE a.run_id = h.run_id AND a.lease_seq = h.lease_seq",
            "\n    WHERE a.run_id = h.run_id",
            _LEDGER,
        ),
    )


ENDS = (
    *_held("release"),
    Guard(
        "instance: a sign-off ends the leases of its own process",
        f"{QUEUE}:end_leases_of_key",
        " AND ($6 = 'revoked' OR lease_instance = $8)",
        "",
        "tests/service/test_instances.py::test_the_old_process_signs_off_and_the_new_ones_result_is_accepted",
    ),
    Guard(
        "instance: a release is by the process that holds the lease",
        f"{QUEUE}:release",
        "            q.lease_instance = $8\n",
        "            true\n",
        "tests/service/test_instances.py::test_the_old_process_hands_back_and_fails_nothing_of_the_new_one",
    ),
    Guard(
        "instance: a failure is by the process that holds the lease",
        f"{QUEUE}:fail",
        "            q.lease_instance = $9\n",
        "            true\n",
        "tests/service/test_instances.py::test_the_old_process_hands_back_and_fails_nothing_of_the_new_one",
    ),
    Guard(
        "instance: a new process hands back what nobody beats for",
        f"{QUEUE}:release",
        "u.instance_id = $8 AND coalesce(q.last_heartbeat, q.claimed_at) < u.started_at",
        "u.instance_id = $8",
        "tests/service/test_instances.py::test_a_new_process_hands_back_nothing_that_another_still_beats_for",
    ),
    Guard(
        "instance: a renewal makes no newer process",
        f"{RUNNERS}:upsert",
        "        WHEN r.previous_instance_id = excluded.instance_id THEN r.previous_started_at\n",
        "",
        "tests/service/test_instances.py::test_the_old_process_hands_back_and_fails_nothing_of_the_new_one",
    ),
    Guard(
        "instance: a heartbeat takes the lease to its process",
        f"{QUEUE}:beat",
        "    lease_instance = b.instance_id, -- who works on it holds it\n",
        "",
        "tests/service/test_instances.py::test_a_process_that_beats_for_a_lease_holds_it",
    ),
    Guard(
        "instance: a resumed lease has another lease_id",
        f"{QUEUE}:take_over",
        "CASE WHEN h.other THEN gen_random_uuid() ELSE q.lease_id END",
        "q.lease_id",
        "tests/service/test_instances.py::test_a_process_that_lost_its_job_resumes_it_and_the_old_one_is_fenced_off",
    ),
    Guard(
        "instance: a resume of its own lease changes nothing",
        f"{QUEUE}:take_over",
        "CASE WHEN h.other THEN gen_random_uuid() ELSE q.lease_id END",
        "gen_random_uuid()",
        "tests/service/test_instances.py::test_a_process_that_lost_its_job_resumes_it_and_the_old_one_is_fenced_off",
    ),
    Guard(
        "instance: a resume of the runner's own leases",
        f"{QUEUE}:take_over",
        " AND q.claimed_by = $2\n",
        "\n",
        "tests/service/test_instances.py::test_what_is_not_held_is_not_resumed_and_nothing_else_is_granted",
    ),
    Guard(
        "instance: a resume by a token that has not ended",
        f"{QUEUE}:take_over",
        " AND $8 <> all(k.ended_tokens)",
        "",
        "tests/service/test_instances.py::test_a_token_that_signed_off_resumes_nothing",
    ),
    Guard(
        "instance: a request from before a restart is no second process",
        f"{RUNNERS}:seen",
        "            AND clock_timestamp() - (h.age_s + 5) * interval '1 second' > r.started_at\n",
        "",
        "tests/service/test_instances.py::test_two_live_processes_of_one_key_are_shown_and_logged_once",
    ),
    Guard(
        "release: an undo finds the lease untouched",
        f"{QUEUE}:release",
        "        AND ($6::timestamptz IS NULL OR q.updated_at = $6)\n",
        "        AND ($6::timestamptz IS NULL OR $6 IS NOT NULL)\n",
        f"{RACES}::test_an_undo_leaves_a_lease_that_another_answer_has_delivered",
    ),
    Guard(
        "release: of a run to be cancelled ends it",
        f"{QUEUE}:release",
        "status = CASE WHEN h.cancel_requested_at IS NULL THEN 'PENDING' ELSE 'CANCELLED' END,",
        "status = 'PENDING',",
        "tests/service/test_admin_queue.py::test_the_runner_of_a_live_run_is_told_at_its_next_heartbeat"
        " tests/service/test_lifecycle_findings.py::test_a_cancelled_run_that_was_released_did_not_fail",
    ),
    *_held("fail"),
    Guard(
        "fail: of a run to be cancelled ends it, uncounted",
        f"{QUEUE}:fail",
        "            WHEN h.cancel_requested_at IS NOT NULL THEN 'CANCELLED'\n",
        "",
        "tests/service/test_releases.py::test_a_failure_of_a_run_that_was_to_be_cancelled_cancels_it",
    ),
    Guard(
        "fail: attempts are used up",
        f"{QUEUE}:fail",
        "            WHEN h.failures >= h.max_attempts THEN 'FAILED'\n",
        "",
        "tests/service/test_releases.py::test_a_failure_counts_waits_longer_each_time_and_goes_further_back",
    ),
    Guard(
        "fail: answered again from its own end only",
        "broker/leases/releases.py",
        ' or set(ended["outcome"] or ()) != set(members)',
        "",
        "tests/service/test_lifecycle_findings.py",
    ),
    Guard("beat: this run", f"{QUEUE}:beat", "q.run_id = b.run_id AND ", "", _RIGHT),
    Guard("beat: the secret", f"{QUEUE}:beat", "    AND q.lease_id = b.lease_id\n", "", _RIGHT),
    Guard("beat: the holder", f"{QUEUE}:beat", "    AND q.claimed_by = b.runner_id\n", "", _RIGHT),
    Guard(
        "beat: a live lease",
        f"{QUEUE}:beat",
        "    AND q.status IN ('CLAIMED', 'IN_PROGRESS')\n",
        "",
        _LIVE,
    ),
    Guard("beat: a key of ours", f"{QUEUE}:beat", "b.fingerprint = k.fingerprint AND ", "", _RIGHT),
    Guard("beat: a key not revoked", f"{QUEUE}:beat", " AND k.revoked_at IS NULL", "", _GOOD),
    Guard(
        "beat: a key whose time is not over",
        f"{QUEUE}:beat",
        "        AND (k.not_after IS NULL OR k.not_after > clock_timestamp())\n",
        "",
        _GOOD,
    ),
    Guard("beat: bakeoff's own rows stay", f"{QUEUE}:beat", " AND q.job IS NOT NULL", "", _LOCAL),
    Guard(
        "beat: never beyond the longest runtime",
        f"{QUEUE}:beat",
        "least(\n        clock_timestamp() + $6::interval,\n"
        "        q.claimed_at + coalesce(q.max_runtime_s, $7) * interval '1 second'\n    ),",
        "clock_timestamp() + $6::interval,",
        "tests/service/test_heartbeats.py::test_no_heartbeat_carries_a_lease_beyond_the_longest_runtime",
    ),
    Guard(
        "complete: this run",
        f"{QUEUE}:complete",
        "q.run_id = $1 AND ",
        "$1::uuid IS NOT NULL AND ",
        _RIGHT,
    ),
    Guard(
        "complete: the secret",
        f"{QUEUE}:complete",
        " AND q.lease_id = $2",
        " AND $2::uuid IS NOT NULL",
        _RIGHT,
    ),
    Guard(
        "complete: the holder",
        f"{QUEUE}:complete",
        " AND q.claimed_by = $3",
        " AND $3::text IS NOT NULL",
        _RIGHT,
    ),
    Guard(
        "complete: live, or lapsed and not claimed since",
        f"{QUEUE}:complete",
        "    AND q.status IN ('CLAIMED', 'IN_PROGRESS', 'PENDING')\n",
        "",
        _LIVE,
    ),
    Guard(
        "complete: late results count",
        f"{QUEUE}:complete",
        "'IN_PROGRESS', 'PENDING')",
        "'IN_PROGRESS')",
        _LIVE,
    ),
    Guard(
        "complete: a key of ours",
        f"{QUEUE}:complete",
        _GOOD_KEY,
        "k.revoked_at IS NULL AND $4::text <> ''",
        _RIGHT,
    ),
    Guard(
        "complete: a key not revoked", f"{QUEUE}:complete", _GOOD_KEY, "k.fingerprint = $4", _GOOD
    ),
    Guard(
        "complete: a key whose time is not over",
        f"{QUEUE}:complete",
        "    AND (k.not_after IS NULL OR k.not_after > clock_timestamp())\n",
        "",
        _GOOD,
    ),
    Guard(
        "complete: bakeoff's own rows stay",
        f"{QUEUE}:complete",
        " AND q.job IS NOT NULL",
        "",
        _LOCAL,
    ),
    Guard(
        "complete: the ledger's row of this lease",
        f"{QUEUE}:complete_attempt",
        "run_id = $1 AND lease_seq = $2",
        "run_id = $1 AND $2::bigint > 0",
        f"{_LEDGER} {SUBMIT}",
    ),
)

SWEEP = (
    Guard(
        "lapse: overdue leases only",
        f"{QUEUE}:lapse",
        "        AND q.lease_expires_at <= clock_timestamp()\n",
        "",
        f"{EXPIRY}::test_one_pass_ends_the_leases_behind_their_deadline_and_leaves_the_others",
    ),
    Guard(
        "lapse: by the index of live leases",
        f"{QUEUE}:lapse",
        "        AND q.lease_slot IS NOT NULL -- of every lease that is live, and of the index\n",
        "",
        "tests/service/test_query_plans.py",
    ),
    Guard(
        "lapse: bakeoff's own rows stay",
        f"{QUEUE}:lapse",
        "q.status IN ('CLAIMED', 'IN_PROGRESS') AND q.job IS NOT NULL\n        AND q.lease_slot",
        "q.status IN ('CLAIMED', 'IN_PROGRESS')\n        AND q.lease_slot",
        f"{EXPIRY}::test_rows_of_bakeoffs_own_local_runner_never_lapse",
    ),
    Guard(
        "lapse: a lease being renewed is not waited for",
        f"{QUEUE}:lapse",
        "FOR UPDATE SKIP LOCKED",
        "FOR UPDATE",
        f"{EXPIRY}::test_a_lease_that_is_being_renewed_is_passed_over_and_not_waited_for",
    ),
    Guard(
        "lapse: a cancelled run ends",
        f"{QUEUE}:lapse",
        "            WHEN o.cancel_requested_at IS NOT NULL THEN 'CANCELLED'\n",
        "",
        f"{EXPIRY}::test_a_run_cancelled_under_a_silent_runner_ends_as_cancelled",
    ),
    Guard(
        "lapse: attempts are used up",
        f"{QUEUE}:lapse",
        "o.failures >= o.max_attempts OR ",
        "",
        f"{EXPIRY}::test_a_run_fails_for_good_when_its_attempts_are_used_up",
    ),
    Guard(
        "lapse: three different runners make poison",
        f"{QUEUE}:lapse",
        " OR s.lost_runners >= 3 THEN",
        " THEN",
        f"{STEERING}::test_a_run_on_which_three_different_runners_fell_silent_is_failed_as_poison",
    ),
    Guard(
        "lapse: different runners, not lapses",
        f"{QUEUE}:lapse",
        "count(DISTINCT s.runner_id)",
        "count(s.runner_id)",
        f"{STEERING}::test_fewer_than_three_different_runners_are_no_proof_of_poison",
    ),
    Guard(
        "lapse: only lapses make poison",
        f"{QUEUE}:lapse",
        " AND a.how = 'lapsed'\n            AND a.claimed_at > coalesce(o.",
        "\n            AND a.claimed_at > coalesce(o.",
        f"{STEERING}::test_only_lapses_make_poison_and_not_failures_or_releases",
    ),
    Guard(
        "lapse: the search starts anew after a requeue",
        f"{QUEUE}:lapse",
        "            AND a.claimed_at > coalesce(o.requeued_at, '-infinity')\n",
        "",
        f"{STEERING}::test_after_a_requeue_the_search_for_poison_starts_anew",
    ),
    Guard(
        "lapse: a late result still finds its lease",
        f"{QUEUE}:lapse",
        "THEN NULL ELSE q.lease_id END",
        "THEN NULL END",
        f"{EXPIRY}::test_a_late_result_counts_until_somebody_else_has_claimed_the_run",
    ),
    Guard(
        "lapse: the ledger's row of this lease",
        f"{QUEUE}:lapse",
        "    WHERE a.run_id = o.run_id AND a.lease_seq = o.lease_seq\n",
        "    WHERE a.run_id = o.run_id\n",
        f"{EXPIRY} {GUARDS}",
    ),
    Guard(
        "need: raised above what failed",
        "db/sql/models.sql:raise_need",
        "had_gb + 1, $1",
        "had_gb, $1",
        "tests/service/test_learned_needs.py::test_an_oom_raises_the_need_above_the_vram_that_failed_and_a_result_lowers_it",
    ),
    Guard(
        "need: never by a machine with twice the rule",
        "db/sql/models.sql:raise_need",
        " AND had_gb < 2 * rule_gb",
        "",
        "tests/service/test_learned_needs.py::test_a_large_machine_that_runs_out_of_memory_teaches_nothing",
    ),
    Guard(
        "need: never lowered by an oom",
        "db/sql/models.sql:raise_need",
        "    WHERE l.need_gb < excluded.need_gb\n",
        "",
        "tests/service/test_learned_needs.py::test_a_smaller_machines_oom_does_not_lower_what_was_learned",
    ),
    Guard(
        "need: of an admin's cap where there is one",
        "db/sql/models.sql:raise_need",
        "least((r.capabilities ->> 'vram_gb')::int, (k.capability_caps ->> 'vram_gb')::int)",
        "(r.capabilities ->> 'vram_gb')::int",
        "tests/service/test_learned_needs.py::test_an_admins_cap_is_the_vram_that_failed",
    ),
    Guard(
        "need: never raised by a result",
        "db/sql/models.sql:lower_need",
        "\n    AND l.need_gb > ceil($2::int / 1024.0)",
        "",
        "tests/service/test_learned_needs.py::test_a_result_with_a_larger_peak_does_not_raise_the_need",
    ),
    Guard(
        "need: of the run's models only",
        "db/sql/models.sql:lower_need",
        " AND l.model_id IN (q.model_id, q.judge_model_id)",
        "",
        "tests/service/test_learned_needs.py::test_what_was_learned_of_another_model_stays",
    ),
    Guard(
        "order: the largest among equals",
        "db/sql/run_queue.sql:claim",
        "h.priority, CASE WHEN $11 THEN h.need_gb END DESC,",
        "h.priority, CASE WHEN $11 THEN NULL END DESC,",
        "tests/service/test_fairness.py::test_the_only_large_machine_takes_the_run_that_only_it_can_do",
    ),
    Guard(
        "order: overtaken by younger ones",
        "db/sql/run_queue.sql:promote_aged",
        " AND o.created_at > h.created_at + $1::interval",
        "",
        "tests/service/test_fairness.py::test_a_run_that_younger_ones_overtake_for_longer_than_a_day_comes_to_the_front",
    ),
    Guard(
        "order: overtaken by equals as well",
        "db/sql/run_queue.sql:promote_aged",
        "h.priority >= o.priority",
        "h.priority > o.priority",
        "tests/service/test_fairness.py::test_equals_that_are_larger_overtake_no_longer_than_a_day",
    ),
    Guard(
        "order: the oldest overtaken run first",
        "db/sql/run_queue.sql:promote_aged",
        "    ORDER BY h.created_at\n    LIMIT",
        "    ORDER BY h.created_at DESC\n    LIMIT",
        "tests/service/test_fairness.py::test_the_oldest_come_first_and_as_many_as_are_asked_for",
    ),
    Guard(
        "order: a share for overtaken runs",
        "broker/leases/claims.py",
        "        due = self._granted // AGED_SHARE",
        "        due = self._granted // 1_000",
        "tests/service/test_fairness.py::test_under_a_flow_of_urgent_runs_others_have_a_share_of_the_claims",
    ),
    Guard(
        "breaker: three failures in a row",
        "db/sql/runners.sql:pause_failing",
        "AND how = 'failed' ) = 3",
        "AND how = 'failed') = 99",
        f"{STEERING}::test_a_runner_that_fails_three_runs_in_a_row_is_paused_for_a_while",
    ),
    Guard(
        "breaker: on three different runs",
        "db/sql/runners.sql:pause_failing",
        "count(DISTINCT run_id) FROM last_leases WHERE age <= 3 AND how",
        "count(run_id) FROM last_leases WHERE age <= 3 AND how",
        f"{STEERING}::test_failures_of_one_run_are_not_three_different_ones",
    ),
    Guard(
        "breaker: another end breaks the row",
        "db/sql/runners.sql:pause_failing",
        " WHERE age <= 3 AND how = 'failed'",
        " WHERE age <= 3",
        f"{STEERING}::test_a_result_breaks_the_row_of_failures",
    ),
    Guard(
        "breaker: leases from before a resume do not count",
        "db/sql/runners.sql:pause_failing",
        "            AND claimed_at > coalesce(r.resumed_at, '-infinity')\n",
        "",
        f"{STEERING}::test_after_a_resume_the_failures_are_counted_anew",
    ),
    Guard(
        "breaker: ten leases handed back",
        "db/sql/runners.sql:pause_failing",
        "WHERE how = 'released') = 10",
        "WHERE how = 'released') = 99",
        f"{STEERING}::test_a_runner_that_hands_ten_leases_back_in_a_row_is_paused",
    ),
    Guard(
        "breaker: a result among them breaks the row",
        "db/sql/runners.sql:pause_failing",
        "count(*) FROM last_leases WHERE how = 'released'",
        "count(*) FROM last_leases WHERE true",
        f"{STEERING}::test_a_runner_that_hands_ten_leases_back_in_a_row_is_paused",
    ),
    Guard(
        "breaker: ten refused bundles",
        "db/sql/runners.sql:pause_failing",
        ") AS refused\n            ) = 10",
        ") AS refused\n            ) = 99",
        f"{STEERING}::test_a_runner_whose_bundles_are_refused_ten_times_is_paused",
    ),
    Guard(
        "breaker: an accepted bundle starts the count of refusals anew",
        "db/sql/runners.sql:pause_failing",
        "(SELECT max(ended_at) FROM last_leases WHERE how = 'completed')",
        "NULL::timestamptz",
        f"{STEERING}::test_a_runner_whose_bundles_are_refused_ten_times_is_paused",
    ),
    Guard(
        "lapse: three in a row pause their runner",
        f"{QUEUE}:lapse",
        "        AND 3 = (",
        "        AND 99 = (",
        f"{STEERING}::test_a_runner_that_lapses_on_three_runs_in_a_row_is_paused",
    ),
    Guard(
        "lapse: on three different runs",
        f"{QUEUE}:lapse",
        "count(DISTINCT e.run_id) FILTER",
        "count(e.run_id) FILTER",
        f"{STEERING}::test_lapses_on_the_same_runs_again_are_not_three_different_ones",
    ),
    Guard(
        "lapse: another end breaks the row",
        f"{QUEUE}:lapse",
        " FILTER (WHERE e.how = 'lapsed')",
        "",
        f"{STEERING}::test_a_lease_that_ended_otherwise_breaks_the_row_of_lapses",
    ),
    Guard(
        "lapse: what lapses beside it counts",
        f"{QUEUE}:lapse",
        "                    f.claimed_by = s.runner_id\n",
        "                    false\n",
        f"{STEERING}::test_three_leases_that_lapse_in_one_pass_pause_their_runner",
    ),
    Guard(
        "lapse: leases from before a resume do not count, beside it",
        f"{QUEUE}:lapse",
        "                    AND f.claimed_at > coalesce(s.resumed_at, '-infinity')\n",
        "",
        "tests/service/test_lifecycle_findings.py",
    ),
    Guard(
        "lapse: leases from before a resume do not count, in the ledger",
        f"{QUEUE}:lapse",
        "                    AND a.claimed_at > coalesce(s.resumed_at, '-infinity')\n",
        "",
        f"{STEERING}::test_a_resumed_runner_may_claim_and_is_given_three_new_lapses",
    ),
    Guard(
        "lapse: cancelled ends count as such beside it",
        f"{QUEUE}:lapse",
        "                    CASE WHEN f.status = 'CANCELLED' THEN 'cancelled' ELSE 'lapsed' END AS how,\n",
        "                    'lapsed' AS how,\n",
        "tests/service/test_lifecycle_findings.py",
    ),
    Guard(
        "sweep: goes on until none is left",
        "broker/leases/sweep.py",
        "if len(rows) < BATCH:",
        "if True:",
        f"{EXPIRY}::test_a_pass_goes_on_until_no_overdue_lease_is_left",
    ),
    Guard(
        "breaker: more than three",
        "broker/leases/sweep.py",
        "MASS = 3\n",
        "MASS = 0\n",
        "tests/service/test_sweep_guards.py",
    ),
    Guard(
        "breaker: counts our leases only",
        f"{QUEUE}:overdue_share",
        " AND job IS NOT NULL",
        "",
        "tests/service/test_sweep_guards.py tests/service/test_sweep.py",
    ),
)

_RUNNER_PAGES = (
    "tests/service/test_admin_runners.py::test_pages_are_in_one_order_lose_none_and_show_none_twice"
)

AUDIT = "tests/service/test_audit.py"
TAMPERED = f"{AUDIT}::test_what_was_changed_in_the_trail_is_named"
CHECK = "auth/audit_chain.py"

AUDITED = (
    Guard(
        "audit: an entry is calculated from its row",
        CHECK,
        'elif entry_hash(self.hash, seq, row).hex() != entry["hash"]:',
        "elif False:",
        TAMPERED,
    ),
    Guard(
        "audit: an entry that is gone is missed",
        CHECK,
        "if seq != self.seq + 1:",
        "if False:",
        TAMPERED,
    ),
    Guard(
        "audit: a row that is gone is missed",
        CHECK,
        "        if row is None:",
        "        if False:",
        TAMPERED,
    ),
    Guard(
        "audit: a row that is in no entry is named",
        CHECK,
        'if now - datetime.fromisoformat(row["at"]) > CHAINED_WITHIN:',
        "if False:",
        TAMPERED,
    ),
    Guard(
        "audit: a row that is written later than it says is named",
        CHECK,
        "if self._latest is not None and self._latest - at > CHAINED_WITHIN:",
        "if False:",
        f"{AUDIT}::test_a_row_that_is_written_later_than_it_says_is_named",
    ),
    Guard(
        "audit: the chain reaches as far as a witness has seen",
        CHECK,
        "return self.problems + late",
        "return self.problems",
        f"{AUDIT}::test_a_tail_that_was_cut_off_is_caught_by_a_receipt",
    ),
    Guard(
        "audit: an entry is the one that a witness has seen",
        CHECK,
        "if (seq, digest) != (self.seq, self.hash.hex()):",
        "if False:",
        _ANEW,
    ),
    Guard(
        "audit: an entry is the one whose hash was signed",
        CHECK,
        'if recorded is not None and recorded != signed["hash"]:',
        "if False:",
        _ANEW,
    ),
    Guard(
        "audit: heads that are missing are missed",
        "cli/audit.py",
        "if check.seq and (newest is None or now - newest > HEAD_WITHIN):",
        "if False:",
        _ANEW,
    ),
    Guard(
        "audit: a witness is signed",
        "cli/audit.py",
        "        signed = verify_receipt(document, known, purpose)",
        "        signed = document",
        f"{AUDIT}::test_a_verification_begins_at_a_witness_and_takes_no_forged_one",
    ),
    Guard(
        "audit: a row that goes before it is chained is chained as gone",
        "db/sql/audit.sql:take_unchained",
        "FROM taken AS t LEFT JOIN",
        "FROM taken AS t INNER JOIN",
        f"{AUDIT}::test_a_row_that_goes_before_it_is_chained_is_chained_as_gone",
    ),
    Guard(
        "audit: a lease that is cancelled by a release leaves a row",
        f"{QUEUE}:release",
        "FROM held AS h WHERE h.cancel_requested_at IS NOT NULL",
        "FROM held AS h WHERE false",
        _TAKEN,
    ),
    Guard(
        "audit: a lease that is cancelled by a failure leaves a row",
        f"{QUEUE}:fail",
        "FROM held AS h WHERE h.cancel_requested_at IS NOT NULL",
        "FROM held AS h WHERE false",
        _TAKEN,
    ),
    Guard(
        "audit: a renewed token leaves no row",
        "broker/runners/registration.py",
        "if before is None or _differs(before, runner):",
        "if True:",
        f"{AUDIT}::"
        "test_a_sign_on_by_another_process_or_from_elsewhere_leaves_a_row_and_a_renewal_none",
    ),
    Guard(
        "roles: the service changes nothing of the audit",
        "db/sql/roles.sql:grant",
        "WHEN each.bare = any(only_added) THEN 'SELECT, INSERT'",
        "WHEN false THEN 'SELECT, INSERT'",
        "tests/service/test_roles.py::"
        "test_the_service_changes_and_removes_nothing_of_the_audit_and_the_bundles",
    ),
    Guard(
        "roles: a reader sees no secret column",
        "db/sql/roles.sql:grant",
        "AND a.attname <> all(secret)",
        "",
        "tests/service/test_roles.py::test_a_reader_reads_all_but_secrets_and_writes_nothing",
    ),
    Guard(
        "roles: a reader sees no secret table",
        "db/sql/roles.sql:grant",
        "IF each.bare <> all(hidden) THEN",
        "IF true THEN",
        "tests/service/test_roles.py::test_a_reader_reads_all_but_secrets_and_writes_nothing",
    ),
)

ADMIN = (
    Guard(
        "authorization: an address asks who sends a request",
        "handlers/base.py",
        "        await self.authenticate()\n",
        "",
        f"{MATRIX}_and_a_refused_one_changes_nothing",
    ),
    Guard(
        "authorization: an admin's address asks its scope",
        "broker/runners/credentials.py",
        'if scope not in row["scopes"]:',
        "if False:",
        f"{MATRIX}_and_a_refused_one_changes_nothing",
    ),
    Guard(
        "admin tokens: one that was revoked meanwhile leaves no row",
        "db/sql/audit.sql:record",
        "token_id = $7 AND revoked_at IS NULL",
        "token_id = $7",
        f"{AUTHORIZED}::"
        "test_an_admin_whose_token_is_revoked_while_their_body_arrives_changes_nothing",
    ),
    Guard(
        "admin tokens: an action without its row is rolled back",
        "broker/audit/log.py",
        "if not await audit.record(connection, by, action, target, **detail):",
        "if await audit.record(connection, by, action, target, **detail) is None:",
        f"{AUTHORIZED}::"
        "test_an_admin_whose_token_is_revoked_while_their_body_arrives_changes_nothing",
    ),
    Guard(
        "admin tokens: a name belongs to one living token",
        "db/migrations/20261127000060_admin_tokens.sql",
        "CREATE UNIQUE INDEX",
        "CREATE INDEX",
        f"{ADMIN_TOKENS}::test_a_name_belongs_to_one_living_token",
    ),
    Guard(
        "admin tokens: the last one that can revoke others stays",
        "broker/admin/admin_tokens.py",
        "if keepers == {token_id}:",
        "if False:",
        f"{ADMIN_TOKENS}::test_the_last_token_that_can_revoke_others_stays_also_of_two_at_once",
    ),
    Guard(
        "admin tokens: the last one of two that are revoked at once stays",
        "db/sql/admin.sql:lock_keepers",
        " FOR UPDATE",
        "",
        f"{ADMIN_TOKENS}::test_the_last_token_that_can_revoke_others_stays_also_of_two_at_once",
    ),
    Guard(
        "admin tokens: a token gives no scope that it has not",
        "broker/admin/admin_tokens.py",
        "    if lacking:",
        "    if False:",
        f"{ADMIN_TOKENS}::test_a_token_gives_no_scope_that_it_has_not",
    ),
    Guard(
        "runner tokens: one that was revoked during an upload submits nothing",
        "handlers/submit.py",
        "        await self.services.credentials.check_revoked(self.runner)",
        "        pass",
        f"{ADMIN_TOKENS}::test_what_a_runner_waits_for_it_does_not_get_after_its_token_was_revoked",
    ),
    Guard(
        "runners: the next page begins after the last row",
        f"{RUNNERS}:overview",
        "runner_id > $2",
        "runner_id >= $2",
        _RUNNER_PAGES,
    ),
    Guard(
        "runners: a page is filled with those that registered here",
        f"{RUNNERS}:overview",
        "key_fingerprint IS NOT NULL AND ",
        "",
        _RUNNER_PAGES,
    ),
    Guard(
        "runners: a cursor is a runner's name",
        "broker/documents/paging.py",
        "if not _RUNNER_ID.fullmatch(name) or write_name(name) != cursor:",
        "if write_name(name) != cursor:",
        "tests/service/test_admin_runners.py::test_a_query_that_makes_no_sense_is_422",
    ),
    Guard(
        "cancel: a run that nobody works on",
        f"{QUEUE}:cancel_pending",
        " AND status = 'PENDING'",
        "",
        "tests/service/test_admin_queue.py",
    ),
    Guard(
        "cancel: bakeoff's own rows stay",
        f"{QUEUE}:cancel_pending",
        " AND job IS NOT NULL",
        "",
        "tests/service/test_admin_queue.py::test_a_run_that_this_queue_did_not_make_is_not_touched",
    ),
    Guard(
        "cancel: a run that somebody works on",
        f"{QUEUE}:cancel_live",
        " AND status IN ('CLAIMED', 'IN_PROGRESS')",
        "",
        "tests/service/test_admin_queue.py::test_a_run_that_has_ended_cannot_be_cancelled",
    ),
    Guard(
        "requeue: only what ended without a result",
        f"{QUEUE}:requeue",
        "status IN ('FAILED', 'CANCELLED') OR",
        "status IN ('FAILED', 'CANCELLED', 'COMPLETE', 'CLAIMED') OR",
        "tests/service/test_requeue.py",
    ),
    Guard(
        "pool: no connection with an open transaction is given back",
        "db/pool.py",
        " or _is_in_transaction(self.connection)",
        "",
        "tests/service/test_pool.py::test_a_connection_with_an_open_transaction_is_closed_and_nobody_complains",
    ),
    Guard(
        "rate: requests whose end is unclear",
        "handlers/base.py",
        "        except MalformedRequest:\n            await self.throttle()\n",
        "        except MalformedRequest:\n",
        "tests/service/test_rates.py::test_a_request_whose_end_is_unclear_is_counted_as_well",
    ),
    Guard(
        "rate: anonymous requests in flight",
        "handlers/base.py",
        "        if known.anonymous.is_limited and not self.hold(known.in_flight, client):\n",
        "        if False:\n",
        "tests/service/test_rates.py::test_an_address_has_so_many_requests_in_flight_and_no_more",
    ),
    Guard(
        "metrics: the token of the settings",
        "handlers/public.py",
        "not compare_digest(self.bearer_token().encode(), wanted.encode())",
        "not self.bearer_token()",
        "tests/service/test_rates.py::test_metrics_may_want_a_token",
    ),
    Guard(
        "requeue: failures of that runner since the last requeue",
        "db/sql/run_queue.sql:failed_by",
        "    AND a.ended_at > coalesce(q.requeued_at, '-infinity')\n",
        "",
        "tests/service/test_requeue.py::test_what_a_runner_failed_is_put_back_in_one_request",
    ),
    Guard(
        "requeue: failures of that time",
        "db/sql/run_queue.sql:failed_by",
        " AND ended_at > clock_timestamp() - $2::interval",
        " AND $2::interval IS NOT NULL",
        "tests/service/test_requeue.py::test_what_a_runner_failed_is_put_back_in_one_request",
    ),
    Guard(
        "enqueue: a dry run is rolled back",
        "broker/jobs/enqueue.py",
        "                await transaction.rollback()\n",
        "                await transaction.commit()\n",
        "tests/service/test_quantizations.py::test_a_dry_run_checks_all_that_the_server_checks_and_adds_nothing",
    ),
    Guard(
        "requeue: one that waits only when its failures are undone",
        f"{QUEUE}:requeue",
        "status = 'PENDING' AND $2::boolean",
        "status = 'PENDING'",
        "tests/service/test_requeue.py::test_a_requeue_leaves_a_pending_run_and_its_history_as_they_are",
    ),
    Guard(
        "requeue: again only of a result that is not complete",
        f"{QUEUE}:again",
        "        AND r.run_status IN ('incomplete', 'failed')\n",
        "",
        "tests/service/test_requeue.py",
    ),
    Guard(
        "requeue: again only once",
        "broker/admin/runs.py",
        "                if superseded is None:\n",
        "                if False:\n",
        "tests/service/test_requeue.py::test_a_run_whose_result_is_not_whole_is_run_again_under_another_id",
    ),
    Guard(
        "breaker: results without a measurement",
        "db/sql/runners.sql:pause_failing",
        " AND s.model_metrics = 0",
        " AND s.model_metrics < 0",
        "tests/service/test_requeue.py::test_three_results_without_a_measurement_pause_the_runner",
    ),
    Guard(
        "requeue: the lease of before cannot submit",
        f"{QUEUE}:requeue",
        # Either alone keeps it out.
        "cancel_reason = NULL, lease_id = NULL,\n        claimed_by = NULL, claimed_at",
        "cancel_reason = NULL,\n        claimed_at",
        "tests/service/test_requeue.py::test_the_lease_of_before_a_requeue_cannot_submit",
    ),
    Guard(
        "enqueue: a run_id is queued once",
        TABLES,
        "CREATE UNIQUE INDEX run_queue_run_id",
        "CREATE INDEX run_queue_run_id",
        "tests/service/test_admin_queue.py",
    ),
    Guard(
        "revoke: ends the leases of this key",
        f"{QUEUE}:end_leases_of_key",
        "        lease_key = $1 AND ",
        "        $1::text <> '' AND ",
        "tests/service/test_admin_keys.py::test_a_revocation_frees_runs_names_results_and_is_final",
    ),
    Guard(
        "revoke: forgets the secrets of lapsed leases",
        f"{QUEUE}:end_leases_of_key",
        " OR status = 'PENDING' AND $6::text = 'revoked')",
        ")",
        f"{GUARDS}::test_a_revocation_forgets_the_secrets_of_lapsed_leases_and_leaves_their_record",
    ),
    Guard(
        "revoke: leaves the record of what ended before",
        f"{QUEUE}:end_leases_of_key",
        " AND a.ended_at IS NULL",
        "",
        f"{GUARDS}::test_a_revocation_forgets_the_secrets_of_lapsed_leases_and_leaves_their_record",
    ),
    Guard(
        "revoke: once",
        f"{KEYS}:revoke",
        " AND revoked_at IS NULL",
        "",
        "tests/service/test_admin_keys.py",
    ),
    Guard(
        "bound: the attempts that a claim tells of",
        f"{QUEUE}:claim",
        "ORDER BY b.lease_seq DESC LIMIT 20",
        "",
        "tests/service/test_bounds.py",
    ),
    Guard(
        "bound: the attempts that a page shows",
        "db/sql/attempts.sql:of_run",
        " LIMIT $3",
        " LIMIT $3 + 1000",
        "tests/service/test_bounds.py",
    ),
    Guard(
        "bound: the released leases that a run keeps",
        f"{QUEUE}:release",
        "a.run_id = f.run_id AND a.lease_seq <= f.lease_seq - $7::int",
        "a.run_id = f.run_id AND a.lease_seq <= f.lease_seq - $7::int * 1000",
        "tests/service/test_bounds.py",
    ),
    Guard(
        "bound: what changed a run is not forgotten",
        f"{QUEUE}:release",
        " AND a.how = 'released'\n",
        "\n",
        "tests/service/test_bounds.py",
    ),
    Guard(
        "bound: the registrations that a key keeps",
        f"{RUNNERS}:remember_nonce",
        "OFFSET $9::int - 1",
        "OFFSET $9::int + 1000",
        "tests/service/test_bounds.py",
    ),
    Guard(
        "bound: the refusals that a runner keeps",
        "db/sql/submissions.sql:refuse",
        "OFFSET $6::int - 1",
        "OFFSET $6::int + 1000",
        "tests/service/test_bounds.py",
    ),
    Guard(
        "refusal: a revoked key is told so",
        f"{QUEUE}:why_refused",
        " AND k.revoked_at IS NULL",
        "",
        "tests/service/test_heartbeats.py",
    ),
    Guard(
        "refusal: a key whose time is over is told so",
        f"{QUEUE}:why_refused",
        "\n            AND (k.not_after IS NULL OR k.not_after > clock_timestamp())",
        "",
        "tests/service/test_heartbeats.py",
    ),
    Guard(
        "revoke: waits for no lock that is asked for later",
        "db/runner_keys.py",
        '    await connection.execute(SQL["keep_others_out"])\n',
        "",
        "tests/service/test_revocation_first.py",
    ),
    Guard(
        "register: waits for a revocation in flight",
        f"{KEYS}:find_for_share",
        " FOR SHARE",
        "",
        "tests/service/test_register.py::test_a_registration_waits_for_a_revocation_in_flight_and_is_then_refused",
    ),
    Guard(
        "revocation: an unknown or expired key is none",
        f"{KEYS}:revoked_among",
        "\n        AND (k.not_after IS NULL OR k.not_after > clock_timestamp())",
        "",
        "tests/service/test_tokens.py tests/service/test_claims.py tests/service/test_health.py",
    ),
    Guard(
        "liveness: bakeoff's own runners are bakeoff's",
        f"{RUNNERS}:mark_dead",
        " AND key_fingerprint IS NOT NULL",
        "",
        "tests/service/test_liveness.py::test_bakeoffs_own_runners_are_left_to_bakeoff",
    ),
)

BELL = (
    Guard(
        "listener: every (re)subscription sweeps",
        "broker/leases/expiry_node.py",
        "            self._subscribed.set()\n            self._notify()\n",
        "            self._subscribed.set()\n",
        "tests/service/test_expiry_listener.py::test_the_listener_sweeps_when_it_subscribes_and_proves_that_it_hears"
        " tests/service/test_expiry_listener.py::test_the_listener_sweeps_and_proves_itself_again_when_it_had_to_reconnect",
    ),
    Guard(
        "listener: a resubscription is proved anew",
        "broker/leases/expiry_node.py",
        "            self._mark(heard=False)\n            self._subscribed.set()",
        "            self._subscribed.set()",
        "tests/service/test_expiry_listener.py::test_the_listener_sweeps_and_proves_itself_again_when_it_had_to_reconnect"
        " tests/service/test_expiry_listener.py::test_a_restart_that_loses_the_notification_setting_is_noticed_when_we_reconnect",
    ),
    Guard(
        "lease keys: what a key waited to be written is off its life",
        "broker/leases/lease_keys.py",
        "(expires - now) * 1000",
        "(expires - now + GATHER_S) * 1000",
        "tests/service/test_lease_keys.py::test_a_key_does_not_live_longer_for_the_time_that_it_gathered",
    ),
    Guard(
        "lease keys: one of a lapsed lease is written with a life",
        "broker/leases/lease_keys.py",
        "max(1, int((expires - now) * 1000))",
        "int((expires - now) * 1000)",
        "tests/service/test_lease_keys.py::test_a_key_whose_lease_lapsed_while_it_gathered_still_rings",
    ),
    Guard(
        "listener: only lease keys ring",
        "broker/leases/expiry_node.py",
        'elif message["type"] == "message" and message["data"].startswith(PREFIX.encode()):',
        'elif message["type"] == "message":',
        "tests/service/test_expiry_listener.py::test_the_listener_rings_for_lease_keys_only",
    ),
    Guard(
        "listener: one lost self-test key is no reason",
        "broker/leases/expiry_node.py",
        "SELF_TESTS = 3",
        "SELF_TESTS = 1",
        "tests/service/test_expiry_listener.py::test_a_flush_that_takes_the_self_tests_key_is_no_reason_to_complain",
    ),
    Guard(
        "listener: proves itself at every interval",
        "broker/leases/expiry_node.py",
        "            except TimeoutError:\n                pass\n            self._subscribed.clear()",
        "            except TimeoutError:\n                continue\n            self._subscribed.clear()",
        "tests/service/test_expiry_listener.py::test_notifications_that_are_switched_off_are_noticed_and_so_is_their_return",
    ),
    Guard(
        "listener: healthy while every primary is heard",
        "broker/leases/expiry_listener.py",
        "all(node.heard and",
        "any(node.heard and",
        "tests/service/test_redis_topology.py::test_a_cluster_is_healthy_only_while_each_primary_is_heard",
    ),
    Guard(
        "listener: the primaries are looked up again",
        "broker/leases/redis_topology.py",
        "        await self.client.nodes_manager.initialize()\n",
        "",
        "tests/service/test_redis_topology.py::test_after_a_resharding_the_primaries_are_looked_up_again",
    ),
    Guard(
        "listener: tells the sweep that it is deaf",
        "broker/leases/expiry_listener.py",
        "        self._sweep.degraded = not healthy\n",
        "",
        "tests/service/test_expiry_listener.py tests/service/test_redis_topology.py::test_a_cluster_is_healthy_only_while_each_primary_is_heard",
    ),
    Guard(
        "cluster: a self-test key lies on its own node",
        "broker/leases/redis_topology.py",
        "            if node is not None and node.name == address:\n",
        "            if node is not None:\n",
        "tests/service/test_redis_topology.py",
    ),
)

SERVER = (
    Guard(
        "stop: writes the lease keys that gathered, whatever ended it",
        "server.py",
        "        stack.push_async_callback(keys.flush)  # when all who put keys have ended\n",
        "",
        "tests/service/test_lease_keys.py::test_a_server_whose_body_raises_writes_the_keys_that_gathered",
    ),
    Guard(
        "stop: a second signal ends it at once",
        "server.py",
        "            loop.remove_signal_handler(number)\n            signal.signal(number, signal.SIG_DFL)\n",
        "            pass\n",
        "tests/service/test_drain.py::test_during_the_notice_all_but_claims_are_served_and_a_second_signal_ends_it",
    ),
    Guard(
        "stop: parked claims are answered at once",
        "server.py",
        "    services.claims.drain()\n",
        "",
        "tests/service/test_drain.py::test_a_parked_claim_is_answered_at_once_and_may_be_sent_again_at_once",
    ),
    Guard(
        "stop: waits for what is in flight",
        "broker/in_flight.py",
        "                await self.wait_idle()\n",
        "                pass\n",
        "tests/service/test_drain.py::test_a_bundle_that_is_arriving_is_taken_in_full_and_then_the_process_ends",
    ),
    Guard(
        "stop: what comes after it is refused",
        "broker/in_flight.py",
        "        self.closed = True\n        return",
        "        return",
        "tests/service/test_drain.py::test_what_comes_when_nothing_is_in_flight_any_more_is_refused_before_it_is_begun",
    ),
    Guard(
        "stop: nothing holds it up for ever",
        "server.py",
        "async with asyncio.timeout(CLOSE_S):",
        "async with asyncio.timeout(None):",
        "tests/service/test_drain.py::test_a_request_that_never_ends_is_cut_after_the_longest_wait",
    ),
    Guard(
        "submit: a whole bundle outlives its connection",
        "handlers/submit.py",
        "        if not self._whole:\n",
        "        if True:\n",
        "tests/service/test_uploads.py::test_a_bundle_that_has_arrived_is_taken_though_its_runner_hung_up",
    ),
    Guard(
        "envelope: names the runner whose lease it is",
        "auth/envelopes.py",
        '    if sig["runner_id"] != runner_id:\n',
        "    if False:\n",
        "tests/service/test_runner_key_policy.py",
    ),
    Guard(
        "signer: a workflow that outsiders start, or that ran elsewhere",
        "auth/signers.py",
        "        children.append(_RunAs(signer.allow))\n",
        "",
        "tests/tools/test_certificate_matrix.py",
    ),
    Guard(
        "envelope: verifies under the runner key",
        "auth/envelopes.py",
        '        key.verify(result, sig["sha256"], sig["signature"])\n',
        "        pass\n",
        "tests/service/test_runner_key_policy.py",
    ),
    Guard(
        "bundle: only the key's own kind of signature",
        "broker/results/bundle.py",
        "counted.keys() & SIGNATURES - {signature}\n",
        "set()\n",
        "tests/service/test_runner_key_policy.py",
    ),
    Guard(
        "result: what it says of the job is what was handed out",
        "broker/results/binding.py",
        "chain(_unbound(result, job), unlike)",
        "_unbound(result, job)",
        f"{SUBMIT}::"
        "test_a_bundle_that_contradicts_its_job_or_itself_is_refused_and_says_which_file",
    ),
    Guard(
        "result: numbers that cannot be are refused",
        "broker/results/verify.py",
        "    check_measurements(result)\n",
        "",
        "tests/service/test_harness_results.py",
    ),
    Guard(
        "manifest: what it repeats of the result is what that says",
        "broker/results/verify.py",
        "    check_agreement(manifest, result)\n",
        "",
        f"{SUBMIT}::"
        "test_a_bundle_that_contradicts_its_job_or_itself_is_refused_and_says_which_file",
    ),
    Guard(
        "manifest: its signature is a file of the bundle",
        "broker/results/manifest.py",
        "    refuse(InvalidBundle, _other_signature(document, submitted))\n",
        "",
        "tests/service/test_runner_key_policy.py",
    ),
)

RESULTS_SQL = "db/sql/submissions.sql"
ADMIN_RESULTS = "tests/service/test_admin_results.py"
ROWS = "tests/service/test_result_rows.py"
VERIFY = "tests/service/test_results_verify.py"
EXPORT = "tests/service/test_results_export.py"

_STALE = "tests/service/test_results_export.py"

RESULTS = (
    Guard(
        "export: a folder that is still written is locked",
        "cli/unfinished.py",
        "fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        f"{_STALE}::test_nobody_deletes_a_folder_that_an_export_still_writes",
    ),
    Guard(
        "export: a folder that is locked is not deleted",
        "cli/unfinished.py",
        "fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        f"{_STALE}::test_nobody_deletes_a_folder_that_an_export_still_writes",
    ),
    Guard(
        "export: a young folder is not deleted",
        "cli/unfinished.py",
        " or time.time() - folder.st_mtime < STALE_S",
        "",
        f"{_STALE}::test_nothing_is_deleted_but_what_a_killed_export_left",
    ),
    Guard(
        "export: a folder that was renamed is not deleted",
        "cli/unfinished.py",
        "not os.path.samestat(folder, path.lstat())",
        "False",
        f"{_STALE}::test_a_folder_that_becomes_a_result_while_it_is_looked_at_stays_whole",
    ),
    Guard(
        "export: a folder with other files is not deleted",
        "cli/unfinished.py",
        "each.name in names and ",
        "",
        f"{_STALE}::test_nothing_is_deleted_but_what_a_killed_export_left",
    ),
    Guard(
        "moderate: the state is the one the admin saw",
        f"{RESULTS_SQL}:moderate",
        " AND state = $2\n",
        "\n",
        f"{ADMIN_RESULTS}::test_of_two_admins_who_saw_the_same_state_the_second_changes_nothing",
    ),
    Guard(
        "moderate: along the legal edges",
        "broker/admin/moderation.py",
        "            check_edge(seen, state)\n",
        "",
        f"{ADMIN_RESULTS}::test_only_the_legal_decisions_can_be_taken",
    ),
    Guard(
        "results: the next page begins after the last row",
        f"{RESULTS_SQL}:list_page",
        "(s.accepted_at, s.run_id) > ($6, $7::uuid)",
        "(s.accepted_at, s.run_id) >= ($6, $7::uuid)",
        f"{ADMIN_RESULTS}::test_the_list_is_of_what_was_asked_for_page_by_page_in_the_order_of_acceptance",
    ),
    Guard(
        "results: of one key",
        f"{RESULTS_SQL}:list_page",
        "    AND ($3::text IS NULL OR s.key_fingerprint = $3)\n",
        "    AND ($3::text IS NULL OR true)\n",
        ADMIN_RESULTS,
    ),
    Guard(
        "revocation: lists what still counts",
        f"{RESULTS_SQL}:accepted_of_key",
        " AND state = 'accepted'",
        "",
        f"{ADMIN_RESULTS}::test_a_revoked_key_and_the_list_name_the_same_results",
    ),
    Guard(
        "accepted_results: nothing that is moderated",
        "db/migrations/20261124000005_moderation.sql",
        "FROM submissions\nWHERE state = 'accepted';\n",
        "FROM submissions;\n",
        f"{ADMIN_RESULTS}::test_readers_of_the_metrics_join_the_view_and_see_what_counts",
    ),
    Guard(
        "http: an answer that ends short is answered",
        "handlers/base.py",
        "            self._leave()  # it ended short",
        "            pass  # it ended short",
        f"{ADMIN_RESULTS}::test_a_file_that_goes_away_while_it_is_sent_ends_short_and_counts_as_answered",
    ),
    Guard(
        "hardware: one writer at a time",
        "db/sql/metrics.sql:lock_hardware",
        "SELECT pg_advisory_xact_lock(hashtext('bakeoff_queue.hardware'))",
        "SELECT 1",
        f"{SUBMIT}::test_submits_at_once_from_the_same_machine_share_one_row_of_each_part {ROWS}",
    ),
    Guard(
        "hardware: what is unknown is equal",
        "db/sql/metrics.sql:get_or_add_system_hardware",
        "h.cpu_model IS NOT DISTINCT FROM w.cpu_model",
        "h.cpu_model = w.cpu_model",
        ROWS,
    ),
    Guard(
        "software: what is unknown is equal",
        "db/sql/metrics.sql:get_or_add_system_software",
        "s.os_name IS NOT DISTINCT FROM w.os_name",
        "s.os_name = w.os_name",
        ROWS,
    ),
    Guard(
        "gpu: what is unknown is equal",
        "db/sql/metrics.sql:get_or_add_gpu_hardware",
        "g.vram_mb IS NOT DISTINCT FROM w.vram_mb",
        "g.vram_mb = w.vram_mb",
        ROWS,
    ),
    Guard(
        "reverify: the stored bytes are those accepted",
        "broker/results/reverify.py",
        "            lambda: check_digests(digests, stored.record),\n",
        "            lambda: None,\n",
        VERIFY,
    ),
    Guard(
        "reverify: the evidence is the record's",
        "broker/results/reverify.py",
        "            lambda: check_evidence(evidence, record),\n",
        "            lambda: None,\n",
        VERIFY,
    ),
    Guard(
        "reverify: a signature that was not checked verifies nothing",
        "broker/results/reverify.py",
        "return VERIFIED if signed else UNSIGNED",
        "return VERIFIED",
        VERIFY,
    ),
    Guard(
        "export: what came is what was accepted",
        "cli/results_export.py",
        "            if hashlib.sha256(content).hexdigest() != wanted[name]:\n",
        "            if False:\n",
        EXPORT,
    ),
    Guard(
        "export: nothing is overwritten",
        "cli/results_export.py",
        "        if odd or hashlib",
        "        if False and hashlib",
        EXPORT,
    ),
    Guard(
        "export: a publisher is a folder's name",
        "cli/results_export.py",
        "    if not PUBLISHER.fullmatch(publisher) or DEVICE.fullmatch(publisher):\n",
        "    if False:\n",
        EXPORT,
    ),
    Guard(
        "export: no link leads elsewhere",
        "cli/results_export.py",
        "        if part.is_symlink() or (",
        "        if False or (",
        EXPORT,
    ),
)

ARCHIVING = (
    Guard(
        "archive: only what is finished",
        f"{ARCHIVE}:archive",
        "q.status IN ('COMPLETE', 'FAILED', 'CANCELLED') AND q.job IS NOT NULL",
        "q.job IS NOT NULL",
        f"{ARCHIVED}::test_a_live_run_stays_whatever_its_row_says",
    ),
    Guard(
        "archive: bakeoff's own rows stay",
        f"{ARCHIVE}:archive",
        " AND q.job IS NOT NULL\n",
        "\n",
        f"{ARCHIVED}::test_rows_of_bakeoffs_own_runner_stay",
    ),
    Guard(
        "archive: only what ended long enough ago",
        f"{ARCHIVE}:archive",
        "        AND q.completed_at < statement_timestamp() - $1::interval\n",
        "        AND $1::interval IS NOT NULL\n",
        f"{ARCHIVED}::test_only_what_ended_long_enough_ago_is_archived_and_with_its_ledger",
    ),
    Guard(
        "archive: a run with an open attempt stays",
        f"{ARCHIVE}:archive",
        "a.ended_at IS NULL\n                    OR 3 >",
        "3 >",
        f"{ARCHIVED}::test_a_run_with_an_open_attempt_stays",
    ),
    Guard(
        "archive: a runner's last three leases stay",
        f"{ARCHIVE}:archive",
        "OR 3 > (",
        "OR 0 > (",
        f"{ARCHIVED}::test_lapses_of_last_week_still_pause_a_runner",
    ),
    Guard(
        "archive: what somebody holds is passed over",
        f"{ARCHIVE}:archive",
        "    FOR UPDATE SKIP LOCKED\n",
        "    FOR UPDATE NOWAIT\n",
        f"{ARCHIVED}::test_a_run_that_is_being_requeued_is_passed_over",
    ),
    Guard(
        "archive: a requeue brings a run without a result back only",
        f"{ARCHIVE}:bring_back",
        " AND status IN ('FAILED', 'CANCELLED')",
        "",
        f"{ARCHIVED}::test_a_completed_run_that_is_archived_is_answered_as_before",
    ),
    Guard(
        "prune: a run with a submission stays",
        f"{PRUNE}:delete_failed_runs",
        "        AND NOT EXISTS (SELECT FROM submissions AS s WHERE s.run_id = r.run_id)\n",
        "",
        f"{PRUNED}::test_neither_a_complete_run_nor_one_with_a_submission_is_ever_pruned",
    ),
    Guard(
        "prune: an accepted result's run stays",
        f"{PRUNE}:delete_failed_runs",
        "r.status <> 'COMPLETE' AND ",
        "",
        f"{PRUNED}::test_neither_a_complete_run_nor_one_with_a_submission_is_ever_pruned",
    ),
    Guard(
        "prune: a failed run stays until its time",
        f"{PRUNE}:delete_failed_runs",
        " AND r.completed_at < statement_timestamp() - $1::interval",
        "\n        AND $1::interval IS NOT NULL",
        f"{PRUNED}::test_failed_runs_go_when_they_are_archived_and_past_their_time",
    ),
    Guard(
        "prune: what somebody holds is passed over",
        f"{PRUNE}:delete_failed_runs",
        "    FOR UPDATE OF r SKIP LOCKED\n",
        "    FOR UPDATE OF r NOWAIT\n",
        f"{PRUNED}::test_what_another_prune_or_a_requeue_holds_is_passed_over",
    ),
    Guard(
        "prune: a failed run keeps its ledger as long as itself",
        f"{PRUNE}:delete_ledgers",
        "r.status = 'COMPLETE' AND ",
        "",
        f"{PRUNED}::test_the_ledger_of_a_result_goes_and_its_runner_still_sees_the_run",
    ),
    Guard(
        "prune: a ledger goes by the end of its run",
        f"{PRUNE}:delete_ledgers",
        " AND r.completed_at < statement_timestamp() - $1::interval",
        "",
        f"{PRUNED}::test_the_ledger_of_a_result_goes_and_its_runner_still_sees_the_run",
    ),
    Guard(
        "prune: refusals stay until their time",
        f"{PRUNE}:delete_refusals",
        "    WHERE refused_at < statement_timestamp() - $1::interval\n",
        "    WHERE $1::interval IS NOT NULL\n",
        f"{PRUNED}::test_records_go_by_their_own_time_and_expired_ones_at_once",
    ),
    Guard(
        "prune: answers stay until their time",
        f"{PRUNE}:delete_answers",
        "    WHERE created_at < statement_timestamp() - $1::interval\n",
        "    WHERE $1::interval IS NOT NULL\n",
        f"{PRUNED}::test_records_go_by_their_own_time_and_expired_ones_at_once",
    ),
    Guard(
        "prune: nonces stay until they have expired",
        f"{PRUNE}:delete_nonces",
        "    WHERE keep_until < statement_timestamp() - $1::interval\n",
        "    WHERE $1::interval IS NOT NULL\n",
        f"{PRUNED}::test_records_go_by_their_own_time_and_expired_ones_at_once",
    ),
    Guard(
        "prune: revocations stay until their tokens have expired",
        f"{PRUNE}:delete_revoked_tokens",
        "    WHERE expires_at < statement_timestamp() - $1::interval\n",
        "    WHERE $1::interval IS NOT NULL\n",
        f"{PRUNED}::test_records_go_by_their_own_time_and_expired_ones_at_once",
    ),
)

WORKERS = (
    Guard(
        "worker: ends with a server that is killed",
        "broker/concurrency/worker_main.py",
        "    threading.Thread(target=_end_with_the_server, daemon=True).start()\n",
        "",
        f"{WORK}::"
        "test_a_server_killed_at_a_verification_takes_its_worker_along_and_the_next_one_accepts",
    ),
    Guard(
        "worker: says nothing to a server that is gone",
        "broker/concurrency/worker_main.py",
        "contextlib.suppress(ConnectionError, EOFError)",
        "contextlib.suppress()",
        f"{WORK}::test_a_worker_that_finds_its_server_gone_at_its_work_says_nothing_either",
    ),
    Guard(
        "worker: leaves signals to the server",
        "broker/concurrency/worker_main.py",
        "        signal.signal(number, signal.SIG_IGN)\n",
        "        signal.signal(number, signal.SIG_DFL)\n",
        f"{WORK}::test_signals_of_a_terminal_or_a_service_manager_are_not_for_workers",
    ),
    Guard(
        "worker: is replaced after a large result, refused or not",
        "broker/concurrency/workers.py",
        "            keep = not last\n",
        "            keep = True\n",
        f"{WORK}::test_after_a_large_result_its_worker_is_replaced"
        f" {WORK}::test_a_huge_hostile_result_is_refused_by_pointer_and_its_worker_replaced",
    ),
    Guard(
        "worker: one that was not waited for is not lent again",
        "broker/concurrency/workers.py",
        "        keep = False\n",
        "        keep = True\n",
        f"{WORK}::test_a_worker_that_does_not_come_to_an_end_is_ended",
    ),
    Guard(
        "worker: has so long and no longer",
        "broker/concurrency/workers.py",
        "asyncio.timeout(LIMIT_S)",
        "asyncio.timeout(None)",
        f"{WORK}::test_a_worker_that_does_not_come_to_an_end_is_ended",
    ),
    Guard(
        "worker: one that died while idle is not lent",
        "broker/concurrency/workers.py",
        "            if worker.process.poll() is None:\n",
        "            if worker:\n",
        f"{WORK}::test_a_worker_that_died_while_idle_is_replaced_before_anybody_notices",
    ),
    Guard(
        "worker: knows no secrets",
        "broker/concurrency/workers.py",
        'env={"PYTHONPATH"',
        'env={**os.environ, "PYTHONPATH"',
        f"{WORK}::test_a_worker_knows_no_secrets",
    ),
    Guard(
        "worker: verifies by what its request says, not by what it knew",
        "auth/signers.py",
        "    return BundleVerifier(file, policy)\n",
        '    return globals().setdefault("KEPT", BundleVerifier(file, policy))\n',
        f"{RELOAD}::test_at_sighup_a_worker_at_its_work_ends_with_the_policy_it_began_with",
    ),
    Guard(
        "worker: a Sigstore bundle has one reading",
        "auth/signers.py",
        "        _require_one_reading(raw, model)\n",
        "",
        "tests/unit/test_one_reading.py::test_a_real_bundle_with_a_second_reading_is_refused_for_that",
    ),
    Guard(
        "worker: counts a result's values before it parses them",
        "broker/results/bundle.py",
        "if strict_json.holds_more(text, MAX_VALUES):",
        "if strict_json.holds_more(text, len(text)):",
        f"{BUNDLES}::test_a_million_tiny_records_are_refused_before_they_are_parsed",
    ),
    Guard(
        "worker: counts the records before the schema looks at them",
        "broker/results/bundle.py",
        "    refuse(RunMismatch, _too_many_records(result, cells))\n",
        "",
        f"{BUNDLES}::"
        "test_far_more_records_than_the_job_has_cells_are_counted_before_any_is_looked_at",
    ),
    Guard(
        "worker: copies for an error only what a rule looks at",
        "broker/documents/schemas.py",
        "self._thin(self._shell, document)",
        "document",
        f"{DOCUMENTS}::test_what_no_rule_looks_at_is_not_copied_for_each_error",
    ),
)

HARNESS = "tests/service/test_harness_results.py"
JUDGES = "tests/service/test_judges.py"
BINDING = "tests/unit/test_binding.py"
CELLS = "tests/unit/test_cells.py"
NEVER = f"{HARNESS}::test_what_the_harness_never_writes_is_refused_by_pointer_and_keeps_the_lease"

MIGRATING = (
    Guard(
        "migrate: a try for a lock is short",
        "db/migrate.py",
        "            await self._limit(TRY_S, local=True)\n",
        "",
        f"{MIGRATE}::test_who_works_on_a_table_is_not_held_up_by_a_migration_that_waits_for_it",
    ),
    Guard(
        "migrate: what an interrupted index left is removed",
        "db/migrate.py",
        'if index and await self._worker.fetchval(SQL["is_invalid"], index[1]):',
        "if False:",
        f"{MIGRATE}::test_an_index_that_was_interrupted_is_made_anew",
    ),
    Guard(
        "migrate: a role's time-outs do not end the lock",
        "db/migrate.py",
        '    await keeper.execute(SQL["keep_transaction"])\n',
        "",
        f"{MIGRATE}::test_a_roles_own_time_outs_do_not_end_the_lock",
    ),
    Guard(
        "migrate: a lock that is lost ends it",
        "db/migrate.py",
        "while not self._keeper.is_closed():",
        "while True:",
        f"{MIGRATE}::test_a_migration_whose_lock_is_lost_ends_and_the_next_goes_on",
    ),
    Guard(
        "migrate: a pooler's session keeps no time-outs of ours",
        "db/migrate.py",
        "        await self._check_session(migration)\n",
        "",
        f"{MIGRATE}::test_behind_a_pooler_what_needs_a_session_is_refused_with_the_fix",
    ),
)

SECRETS = "tests/service/test_secrets.py"
SECRET = (
    Guard(
        "secrets: an error quotes no row",
        "db/pool.py",
        '            vars(exc_val)["detail"] = None\n',
        "            pass\n",
        f"{SECRETS}::test_an_error_of_the_pool_quotes_no_row",
    ),
    Guard(
        "secrets: a child gets none of our environment",
        "broker/concurrency/workers.py",
        'env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},',
        'env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},',
        f"{SECRETS}::test_a_server_shows_no_secret_in_its_logs_answers_and_children",
    ),
    Guard(
        "secrets: an address that means two things is refused",
        "config/urls.py",
        "    if not _is_plain(url):",
        "    if False:",
        f"{SECRETS}::test_what_is_wrong_with_a_secret_is_told_without_it",
    ),
    Guard(
        "secrets: an option's value is hidden",
        "config/urls.py",
        "{value if name in SHOWN_OPTIONS else HIDDEN}",
        "{value}",
        f"{SECRETS}::test_an_address_is_shown_without_its_password",
    ),
)

UPSTREAM = (
    Guard(
        "binding: the config hash is of the result's own config",
        "broker/results/binding.py",
        """    if result["provenance"]["config_hash"] != harness_hash(result["config"]):
        yield Violation("/provenance/config_hash", OTHER_HASH)
""",
        "",
        f"{BINDING}::test_the_config_hash_is_that_of_the_results_own_config",
    ),
    Guard(
        "binding: a complete run has every main cell",
        "broker/results/binding.py",
        "        yield from _missing(job, seen)\n",
        "        pass\n",
        f"{BINDING}::test_a_complete_run_has_every_main_cell",
    ),
    Guard(
        "binding: a comparison is of the job's model on both sides",
        "broker/results/binding.py",
        'for member in ("a_model", "b_model") if pairwise else',
        'for member in ("a_model",) if pairwise else',
        f"{BINDING}::test_a_comparison_of_two_models_is_none_of_a_run_of_one",
    ),
    Guard(
        "binding: the weights are those of the job",
        "broker/results/consistency.py",
        """        yield from _other_weights(job.config["models"][0], model, ("config", "models", index))
""",
        "        pass\n",
        NEVER,
    ),
    Guard(
        "binding: the judge is that of the job",
        "broker/results/consistency.py",
        """    yield from _other_weights(_members(job.config.get("judge")), config.get("judge"), _JUDGE)
""",
        "",
        NEVER,
    ),
    Guard(
        "submit: what the archive refuses is refused",
        "broker/results/verify.py",
        "    check_archivable(manifest, result)\n",
        "",
        NEVER,
    ),
    Guard(
        "export: what the archive refuses is not written",
        "cli/results_export.py",
        "        _check_archivable(beside)\n",
        "",
        f"{HARNESS}::test_an_older_result_that_the_archive_would_refuse_is_named_and_not_exported",
    ),
    Guard(
        "rows: a judge that failed leaves no score",
        "broker/jobs/cells.py",
        "        if judged.score is None:\n            return None\n",
        "        if judged.score is None:\n            return 0.0\n",
        f"{CELLS}::test_a_judge_that_failed_leaves_no_score_and_says_why",
    ),
    Guard(
        "rows: no GPU row without a model",
        "db/metrics.py",
        "    if of.gpu_model is not None:",
        "    if True:",
        f"{HARNESS}::test_a_machine_of_which_the_gpu_or_nothing_is_known_has_no_gpu_row",
    ),
    Guard(
        "claim: the judge fits as well",
        f"{QUEUE}:claim",
        "        greatest(m.need_gb, j.need_gb) AS need_gb\n    FROM queue_heads() AS w\n    INNER",
        "        m.need_gb AS need_gb\n    FROM queue_heads() AS w\n    INNER",
        f"{JUDGES}::test_a_deferred_run_waits_for_both_too",
    ),
    Guard(
        "claim: the judge's quantization as well",
        f"{QUEUE}:claim",
        "                    AND f.judge_quantization = any(k.quantizations)\n",
        "",
        f"{JUDGES}::test_a_runner_must_support_the_judges_quantization_as_well",
    ),
    Guard(
        "enqueue: a run sent again has the same judge",
        f"{QUEUE}:compared",
        "WHERE q.judge_model_id <> t.judge_model_id",
        "WHERE false",
        f"{JUDGES}::test_the_same_run_with_another_judge_is_another_run",
    ),
    Guard(
        "enqueue: pairwise for one model is refused",
        "broker/jobs/enqueue_request.py",
        'if judge.get("mode", PAIRWISE) == PAIRWISE:',
        "if False:",
        f"{JUDGES}::test_a_judge_that_cannot_judge_one_model_is_refused_with_the_fix",
    ),
    Guard(
        "enqueue: a descriptor's uuid is the id that follows from it",
        "broker/jobs/model_rows.py",
        'if not wrong and descriptor.get("uuid") not in (None, str(model_id_of(descriptor))):',
        "if False:",
        f"{JUDGES}::test_a_descriptor_is_taken_as_bakeoffs_store_keeps_it",
    ),
    Guard(
        "signer policy: GitHub's id of the owner",
        "auth/signers.py",
        "        children.append("
        "certificate_policy.OIDCSourceRepositoryOwnerIdentifier(signer.owner_id))\n",
        "        pass\n",
        "tests/unit/test_signers.py::test_a_repository_of_the_same_name_with_other_ids_is_not_allowed",
    ),
    Guard(
        "signer policy: GitHub's id of the repository",
        "auth/signers.py",
        "        children.append("
        "certificate_policy.OIDCSourceRepositoryIdentifier(signer.repository_id))\n",
        "        pass\n",
        "tests/unit/test_signers.py::test_a_repository_of_the_same_name_with_other_ids_is_not_allowed",
    ),
    Guard(
        "signer policy: a reload tells of entries that never match",
        "broker/reload.py",
        "self._trusted.use(verifier)",
        "self._trusted.verifier = verifier",
        f"{RELOAD}::test_an_entry_that_can_never_match_is_told_at_the_start_and_at_each_reload",
    ),
    Guard(
        "signer policy: nothing but entries that never match is refused",
        "auth/signer_policy.py",
        "    if problems or not signers:",
        "    if problems:",
        "tests/unit/test_signer_policy.py::test_a_policy_of_nothing_but_such_entries_is_refused",
    ),
    Guard(
        "log: a line that cannot be written is dropped",
        "config/log_writer.py",
        "            except Exception:  # a full disk",
        "            except ZeroDivisionError:  # a full disk",
        "tests/service/test_supervision.py::test_a_program_goes_on_and_ends_whatever_becomes_of_its_log",
    ),
    Guard(
        "log: a line that does not fit is dropped",
        "config/log_writer.py",
        "        except queue.Full:\n            self.dropped += 1\n",
        "        except ZeroDivisionError:\n            self.dropped += 1\n",
        "tests/service/test_supervision.py::test_what_does_not_fit_into_memory_is_dropped_and_counted",
    ),
    Guard(
        "loops: one that fails is started again",
        "broker/concurrency/supervision.py",
        "    except BaseException as error:  # a panic",
        "    except ZeroDivisionError as error:  # a panic",
        "tests/service/test_supervision.py::test_a_loop_that_ends_is_started_again_and_told",
    ),
    Guard(
        "adoption: numbered models are refused",
        "db/migrations/20261123000001_upstream_tables.sql",
        "    IF FOUND THEN\n",
        "    IF false THEN\n",
        "tests/service/test_adoption.py::"
        "test_a_database_with_numbered_models_is_refused_in_a_sentence_and_kept",
    ),
)

LOOPS = "tests/service/test_supervision.py"
KEPT = "tests/service/test_kept_connections.py"

SLOW = "tests/service/test_slow_lines.py"
SOCKETS = "tests/service/test_sockets.py"

HTTP = (
    Guard(
        "sockets: accept rests when it cannot",
        "handlers/connections.py",
        "        self._listen_no_more()\n        self._resume = ",
        "        self._resume = ",
        f"{SOCKETS}::test_accept_rests_when_it_cannot_and_goes_on_when_it_can",
    ),
    Guard(
        "sockets: one address has its share",
        "handlers/connections.py",
        "if client and most and self._of_client[client] >= most:",
        "if False:",
        f"{SOCKETS}::test_one_address_has_its_share_of_the_connections_and_no_more",
    ),
    Guard(
        "sockets: proxies have no share",
        "handlers/connections.py",
        'client = "" if self._limits.proxies.trusts(peer) else client_of(peer)',
        "client = client_of(peer)",
        f"{SOCKETS}::test_a_trusted_proxy_passes_many_clients_on",
    ),
    Guard(
        "sockets: who is idle makes room",
        "handlers/connections.py",
        "        if self._is_over():\n            self._make_room()\n",
        "",
        f"{SOCKETS}::test_the_connection_that_was_idle_for_longest_makes_room",
    ),
    Guard(
        "sockets: who works makes no room",
        "handlers/connections.py",
        "            if stream.request is None:\n",
        "            if True:\n",
        f"{SOCKETS}::test_more_parked_claims_than_connections_are_answered_and_others_get_through",
    ),
    Guard(
        "sockets: claims wait on nine tenths of them",
        "broker/leases/claims.py",
        " or self.parked.is_full:",
        ":",
        f"{SOCKETS}::test_more_parked_claims_than_connections_are_answered_and_others_get_through",
    ),
    Guard(
        "sockets: the process' own are kept",
        "config/descriptors.py",
        "    return limit - own\n",
        "    return limit\n",
        f"{SOCKETS}::test_more_idle_connections_than_there_are_descriptors_stop_nothing",
    ),
    Guard(
        "sockets: the limit is raised",
        "server.py",
        "    raise_limit()\n",
        "",
        f"{SOCKETS}::test_more_idle_connections_than_there_are_descriptors_stop_nothing",
    ),
    Guard(
        "slow lines: a body that stands still is given up",
        "handlers/connections.py",
        "        return moved < FLOOR_BYTES",
        "        return False",
        f"{SLOW}::test_a_body_that_stands_still_is_answered_and_logged_on_every_address",
    ),
    Guard(
        "slow lines: what moves is not given up",
        "handlers/connections.py",
        "        return moved < FLOOR_BYTES",
        "        return True",
        f"{SLOW}::test_an_upload_that_moves_is_taken_however_long_it_takes",
    ),
    Guard(
        "slow lines: the rest of what is refused is not waited for",
        "handlers/connections.py",
        " and not request.doomed:",
        ":",
        f"{SLOW}::test_a_refusal_of_a_body_that_stands_still_is_the_refusal",
    ),
    Guard(
        "slow lines: a head has 10 s",
        "handlers/connections.py",
        "        if now - self._head_since < HEAD_S:\n            return None\n        self.close()\n",
        "",
        f"{SLOW}::test_a_head_that_does_not_come_ends_the_connection",
    ),
    Guard(
        "slow lines: an answer that nobody reads is given up",
        "handlers/connections.py",
        "        self.lingers = False\n        self.close()\n",
        "",
        f"{SLOW}::test_an_answer_that_nobody_reads_is_given_up_and_told",
    ),
    Guard(
        "slow lines: a refusal is read before its connection is reset",
        "handlers/connections.py",
        "        if self.lingers:\n",
        "        if False:\n",
        f"{SLOW}::test_a_refusal_reaches_a_client_that_sends_megabytes_after_it",
    ),
    Guard(
        "slow lines: a suspended process cuts nobody",
        "handlers/connections.py",
        "now += min(time.monotonic() - last, 2 * PATROL_S)",
        "now += time.monotonic() - last",
        f"{SLOW}::test_the_patrols_clock_stands_still_while_the_process_does",
    ),
    Guard(
        "loops: one that is cancelled from within is started again",
        "broker/concurrency/supervision.py",
        "        if asked_to_stop():\n            raise\n",
        "        raise\n",
        f"{LOOPS}::test_a_loop_that_ends_is_started_again_and_told",
    ),
    Guard(
        "loops: a vital one that never gets to work ends the process",
        "broker/concurrency/supervision.py",
        "            if loop.vital and loop.failures >= GIVE_UP:\n                return\n",
        "",
        f"{LOOPS}::test_a_server_whose_loop_cannot_be_kept_running_drains_and_ends",
    ),
    Guard(
        "loops: one that nobody keeps running ends the process",
        "broker/concurrency/supervision.py",
        "        task.add_done_callback(self._ended)\n",
        "",
        f"{LOOPS}::test_a_loop_that_nobody_keeps_running_any_more_ends_the_process",
    ),
    Guard(
        "loops: a Redis node's that ended is replaced",
        "broker/leases/expiry_listener.py",
        "            del self._nodes[address]\n",
        "",
        "tests/service/test_expiry_listener.py::"
        "test_a_node_that_nobody_listens_to_any_more_is_noticed_and_replaced",
    ),
    Guard(
        "loops: who waits for a shared call hears of its end, however it ends",
        "broker/concurrency/batching.py",
        "        except BaseException as error:",
        "        except ZeroDivisionError as error:",
        "tests/unit/test_batching.py::"
        "test_a_call_that_ends_in_no_way_it_should_lets_nobody_wait_for_ever",
    ),
    Guard(
        "token: machines whose clocks differ a little take each other's",
        "auth/tokens.py",
        "leeway=LEEWAY,",
        "leeway=0,",
        f"{TOKENS}::test_a_token_of_a_machine_whose_clock_differs_is_taken_new_and_old",
    ),
    Guard(
        "token: a revocation lasts as long as any machine takes the token",
        "auth/tokens.py",
        "return self.expires_at + 2 * LEEWAY",
        "return self.expires_at",
        f"{TOKENS}::test_a_token_that_the_leeway_alone_keeps_alive_can_be_revoked_all_the_same",
    ),
    Guard(
        "token: a key's revocation lasts as long as any machine takes its tokens",
        "auth/tokens.py",
        "return self._ttl + 2 * LEEWAY",
        "return self._ttl",
        f"{TOKENS}::test_a_flushed_redis_does_not_unrevoke",
    ),
    Guard(
        "register: a nonce is kept as long as any machine takes its signature",
        "broker/runners/registration.py",
        "seconds=2 * self._settings.clock_skew_s) + 2 * LEEWAY",
        "seconds=2 * self._settings.clock_skew_s)",
        "tests/service/test_register.py::test_a_nonce_is_kept_as_long_as_its_signature_may_be_replayed",
    ),
    Guard(
        "http: an answer that ends its connection says so",
        "handlers/base.py",
        "self._unread = True\n        self._arrived",
        "self._unread = False\n        self._arrived",
        KEPT,
    ),
    Guard(
        "http: a parameter that an address does not know",
        "handlers/base.py",
        "        self.asked = self._query()\n",
        "",
        "tests/service/test_hostile_http.py::test_every_address_refuses_a_parameter_that_it_does_not_know",
    ),
    Guard(
        "http: a request of unclear length",
        "handlers/base.py",
        "self._check_framing()\n        except",
        "pass\n        except",
        "tests/service/test_hostile_http.py::"
        "test_a_request_of_unclear_length_is_400_and_nothing_behind_it_is_read",
    ),
    Guard(
        "http: an Idempotency-Key that is sent twice",
        "handlers/queue.py",
        "len(keys) > 1 or ",
        "",
        "tests/service/test_hostile_http.py::test_an_idempotency_key_that_is_sent_twice_is_refused",
    ),
    Guard(
        "signature: a checkpoint with thousands of signatures",
        "auth/signers.py",
        "        _require_few_signatures(model)\n",
        "",
        "tests/unit/test_signers.py",
    ),
    Guard(
        "http: a refusal of a request without a body keeps the connection",
        "handlers/base.py",
        "int(length[:20]) <= most",
        "0 < int(length[:20]) <= most",
        KEPT,
    ),
)

ALL = (
    ENQUEUED
    + PAUSES
    + RINGS
    + CLAIM
    + ENDS
    + SWEEP
    + AUDITED
    + ADMIN
    + BELL
    + SERVER
    + RESULTS
    + ARCHIVING
    + WORKERS
    + MIGRATING
    + SECRET
    + UPSTREAM
    + HTTP
)
