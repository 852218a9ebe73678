-- name: archive
-- Move up to $2 runs that ended more than $1 ago, with their attempts, after the place ($3, $4) that
-- the last batch came to. Every process runs it; SKIP LOCKED makes their batches disjoint and passes
-- over a run that is being requeued. The state is read again under the row's lock. Only rows of
-- ours: those without a job are bakeoff's. Returns the last place and how many were moved.
WITH old AS MATERIALIZED (
    SELECT q.queue_id FROM run_queue AS q
    WHERE
        q.status IN ('COMPLETE', 'FAILED', 'CANCELLED') AND q.job IS NOT NULL
        -- A time that moves on (clock_timestamp) bounds no index: each pass would read every run
        -- that is too young.
        AND q.completed_at < statement_timestamp() - $1::interval
        AND (q.completed_at, q.queue_id) > ($3::timestamptz, $4::uuid)
        -- The sweep pauses a runner whose last three leases lapsed, and asks the hot ledger: the
        -- last three of each runner stay there, and what is still open.
        AND NOT EXISTS (
            SELECT FROM attempts AS a
            WHERE
                a.run_id = q.run_id
                AND (
                    a.ended_at IS NULL
                    OR 3 > (
                        SELECT count(*) FROM (
                            SELECT FROM attempts AS n
                            WHERE
                                n.runner_id = a.runner_id AND n.claimed_at > a.claimed_at
                                AND n.ended_at IS NOT NULL
                            LIMIT 3
                        ) AS newer
                    )
                )
        )
    ORDER BY q.completed_at, q.queue_id
    LIMIT $2
    FOR UPDATE SKIP LOCKED
),

gone AS (
    DELETE FROM run_queue AS q USING old AS o WHERE q.queue_id = o.queue_id
    RETURNING q.*
),

kept AS (
    INSERT INTO run_archive (
        queue_id, run_id, prompt_id, priority, status, attempt_count, max_attempts, claimed_by,
        claimed_at, started_at, completed_at, error_detail, retry_after, source_file,
        created_at, updated_at, model_id, judge_model_id, job, config_hash, batch_id,
        max_runtime_s, lease_seq, lease_id, lease_key, lease_expires_at, lease_slot,
        last_heartbeat, claim_key, claim_digest, cancel_requested_at, cancel_reason,
        requeued_at, progress, result_sha256, lease_instance
    )
    SELECT
        queue_id, run_id, prompt_id, priority, status, attempt_count, max_attempts, claimed_by,
        claimed_at, started_at, completed_at, error_detail, retry_after, source_file,
        created_at, updated_at, model_id, judge_model_id, job, config_hash, batch_id,
        max_runtime_s, lease_seq, lease_id, lease_key, lease_expires_at, lease_slot,
        last_heartbeat, claim_key, claim_digest, cancel_requested_at, cancel_reason,
        requeued_at, progress, result_sha256, lease_instance
    FROM gone
),

ledger_gone AS (
    DELETE FROM attempts AS a USING gone AS g WHERE a.run_id = g.run_id
    RETURNING a.*
),

ledger_kept AS (
    INSERT INTO attempts_archive (
        run_id, lease_seq, lease_id, runner_id, key_fingerprint, claimed_at, started_at,
        last_heartbeat, ended_at, how, failure_code, detail, progress, outcome
    )
    SELECT
        run_id, lease_seq, lease_id, runner_id, key_fingerprint, claimed_at, started_at,
        last_heartbeat, ended_at, how, failure_code, detail, progress, outcome
    FROM ledger_gone
)

SELECT completed_at, queue_id, count(*) OVER () AS moved FROM gone
ORDER BY completed_at DESC, queue_id DESC LIMIT 1

-- name: bring_back
-- Move an archived run that has no result back, with its attempts: what `requeue` then finds. Its
-- ledger comes along, as claims and the sweep read that of the runs they hand out and end.
WITH gone AS (
    DELETE FROM run_archive WHERE run_id = $1 AND status IN ('FAILED', 'CANCELLED')
    RETURNING *
),

kept AS (
    INSERT INTO run_queue (
        queue_id, run_id, prompt_id, priority, status, attempt_count, max_attempts, claimed_by,
        claimed_at, started_at, completed_at, error_detail, retry_after, source_file,
        created_at, updated_at, model_id, judge_model_id, job, config_hash, batch_id,
        max_runtime_s, lease_seq, lease_id, lease_key, lease_expires_at, lease_slot,
        last_heartbeat, claim_key, claim_digest, cancel_requested_at, cancel_reason,
        requeued_at, progress, result_sha256, lease_instance
    )
    SELECT
        queue_id, run_id, prompt_id, priority, status, attempt_count, max_attempts, claimed_by,
        claimed_at, started_at, completed_at, error_detail, retry_after, source_file,
        created_at, updated_at, model_id, judge_model_id, job, config_hash, batch_id,
        max_runtime_s, lease_seq, lease_id, lease_key, lease_expires_at, lease_slot,
        last_heartbeat, claim_key, claim_digest, cancel_requested_at, cancel_reason,
        requeued_at, progress, result_sha256, lease_instance
    FROM gone
),

ledger_gone AS (
    DELETE FROM attempts_archive AS a USING gone AS g WHERE a.run_id = g.run_id
    RETURNING a.*
),

ledger_kept AS (
    INSERT INTO attempts (
        run_id, lease_seq, lease_id, runner_id, key_fingerprint, claimed_at, started_at,
        last_heartbeat, ended_at, how, failure_code, detail, progress, outcome
    )
    SELECT
        run_id, lease_seq, lease_id, runner_id, key_fingerprint, claimed_at, started_at,
        last_heartbeat, ended_at, how, failure_code, detail, progress, outcome
    FROM ledger_gone
)

SELECT run_id FROM gone

-- name: fold_counts
-- Make few rows of the many that count the archive: one per state. The sum stays what it is, and
-- two that fold at once take different rows.
WITH folded AS (
    DELETE FROM run_archive_changes
    WHERE change_id = any(
        ARRAY(SELECT change_id FROM run_archive_changes FOR UPDATE SKIP LOCKED)
    )
    RETURNING status, runs
)

INSERT INTO run_archive_changes (status, runs)
SELECT status, sum(runs) FROM folded GROUP BY status HAVING sum(runs) <> 0
