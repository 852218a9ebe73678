-- name: add
INSERT INTO submissions (
    run_id, lease_seq, runner_id, key_fingerprint, result_sha256, signer_identity, signer_issuer,
    log_index, logged_at, model_metrics, hardware_metrics, accepted_at, receipt_id, receipt, trust
) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
RETURNING *

-- name: find
SELECT * FROM submissions WHERE run_id = $1

-- name: publish
-- The run's row as the leaderboard reads it.
UPDATE runs SET
    run_status = $2, submitted_at = $3, publisher_id = $4, runner_id = $4, runner_version = $5,
    prompt_git_hash = $6
WHERE run_id = $1

-- name: refuse
INSERT INTO submission_refusals (run_id, runner_id, key_fingerprint, code, detail)
VALUES ($1, $2, $3, $4, $5)

-- name: accepted_of_key
-- Results that a revoked key brought: each may need a look.
SELECT run_id FROM submissions
WHERE key_fingerprint = $1 AND state = 'accepted' ORDER BY accepted_at

-- name: add_runs
-- A queued run is in upstream's `runs` from the start; who published it is known at the end.
INSERT INTO runs (run_id, submitted_at, publisher_id, run_status)
SELECT t.run_id, now(), 'bakeoff-queue', 'incomplete' FROM unnest($1::uuid []) AS t (run_id)
ON CONFLICT DO NOTHING
RETURNING run_id
