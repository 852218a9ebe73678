-- name: of_run
-- The newest $3 rows of a run's ledger, or of one runner's ($2) part of it, oldest first; lease_id
-- stays inside.
SELECT
    a.lease_seq, a.runner_id, a.key_fingerprint, a.claimed_at, a.started_at, a.last_heartbeat,
    a.ended_at, a.how, a.failure_code, a.detail, a.progress
FROM (
    SELECT * FROM every_attempt
    WHERE run_id = $1 AND ($2::text IS NULL OR runner_id = $2)
    ORDER BY lease_seq DESC LIMIT $3
) AS a
ORDER BY a.lease_seq

-- name: by_lease
-- How a lease of this runner ended: what a repeated release or fail is answered from.
SELECT how, outcome, lease_seq FROM every_attempt
WHERE run_id = $1 AND lease_id = $2 AND runner_id = $3 AND ended_at IS NOT NULL
