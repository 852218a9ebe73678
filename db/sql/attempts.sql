-- name: of_run
-- The ledger of a run, oldest first; lease_id stays inside.
SELECT
    lease_seq, runner_id, key_fingerprint, claimed_at, started_at, last_heartbeat, ended_at, how,
    failure_code, detail, progress
FROM every_attempt WHERE run_id = $1 ORDER BY lease_seq

-- name: by_lease
-- How a lease of this runner ended: what a repeated release or fail is answered from.
SELECT how, outcome, lease_seq FROM every_attempt
WHERE run_id = $1 AND lease_id = $2 AND runner_id = $3 AND ended_at IS NOT NULL
