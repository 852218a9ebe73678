-- name: add
INSERT INTO submissions (
    run_id, lease_seq, runner_id, key_fingerprint, result_sha256, signer_identity, signer_issuer,
    log_index, logged_at, model_metrics, hardware_metrics, accepted_at, receipt_id, receipt, trust
) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
RETURNING *

-- name: find
SELECT * FROM submissions WHERE run_id = $1

-- name: publish
-- The run's row as the leaderboard reads it; a result that tells no version has its runner's.
UPDATE runs SET
    run_status = $2, submitted_at = $3, publisher_id = $4, runner_id = $4,
    runner_version = coalesce($5, (SELECT r.version FROM runners AS r WHERE r.runner_id = $4)),
    prompt_git_hash = $6
WHERE run_id = $1

-- name: refuse
-- A runner can send bundles that are none without end: its newest $6 refusals are kept.
WITH forgotten AS (
    DELETE FROM submission_refusals
    WHERE
        runner_id = $2 AND refused_at < (
            SELECT n.refused_at FROM submission_refusals AS n
            WHERE n.runner_id = $2
            ORDER BY n.refused_at DESC OFFSET $6::int - 1 LIMIT 1
        )
)

INSERT INTO submission_refusals (run_id, runner_id, key_fingerprint, code, detail)
VALUES ($1, $2, $3, $4, $5)

-- name: refusals
-- Refused submits, the newest first, before the cursor ($3): of one run ($1) or runner ($2), if given.
SELECT refusal_id, refused_at, run_id, runner_id, key_fingerprint, code, detail
FROM submission_refusals
WHERE
    ($1::uuid IS NULL OR run_id = $1) AND ($2::text IS NULL OR runner_id = $2)
    AND refusal_id < $3
ORDER BY refusal_id DESC
LIMIT $4

-- name: last_day
-- The last 24 hours of a runner ($1): its leases by how they ended, and its refused submits by code.
SELECT 'attempts' AS kind, coalesce(how, 'live') AS name, count(*) AS number
FROM every_attempt
WHERE runner_id = $1 AND claimed_at > clock_timestamp() - interval '24 hours'
GROUP BY how
UNION ALL
SELECT 'refusals', code, count(*)
FROM submission_refusals
WHERE runner_id = $1 AND refused_at > clock_timestamp() - interval '24 hours'
GROUP BY code
ORDER BY kind, name

-- name: accepted_of_key
-- Results that a revoked key brought: each may need a look.
SELECT run_id FROM submissions
WHERE key_fingerprint = $1 AND state = 'accepted' ORDER BY accepted_at, run_id

-- name: add_runs
-- A queued run is in upstream's `runs` from the start; who published it is known at the end.
INSERT INTO runs (run_id, submitted_at, publisher_id, run_status)
SELECT t.run_id, now(), 'bakeoff-queue', 'incomplete' FROM unnest($1::uuid []) AS t (run_id)
ON CONFLICT DO NOTHING
RETURNING run_id

-- name: list_page
-- One page of the admin's list, oldest first, after the cursor ($6, $7).
SELECT
    s.run_id, s.state, s.state_reason, s.trust, s.runner_id, s.key_fingerprint, s.signer_identity,
    s.signer_issuer, s.result_sha256, s.accepted_at, r.publisher_id, r.run_status, m.name AS model
FROM submissions AS s
INNER JOIN runs AS r ON s.run_id = r.run_id
LEFT JOIN every_run AS q ON s.run_id = q.run_id AND q.job IS NOT NULL
LEFT JOIN models AS m ON q.model_id = m.model_id
WHERE
    ($1::text IS NULL OR s.state = $1)
    AND ($2::text IS NULL OR s.runner_id = $2)
    AND ($3::text IS NULL OR s.key_fingerprint = $3)
    AND ($4::text IS NULL OR s.trust = $4)
    AND ($5::timestamptz IS NULL OR s.accepted_at >= $5)
    AND ($6::timestamptz IS NULL OR (s.accepted_at, s.run_id) > ($6, $7::uuid))
ORDER BY s.accepted_at, s.run_id
LIMIT $8

-- name: show
-- A submission with what it takes to verify it again: a runner key's row is never deleted.
SELECT
    s.*, r.publisher_id, r.run_status, m.name AS model, k.public_key, k.revoked_at AS key_revoked_at
FROM submissions AS s
INNER JOIN runs AS r ON s.run_id = r.run_id
LEFT JOIN every_run AS q ON s.run_id = q.run_id AND q.job IS NOT NULL
LEFT JOIN models AS m ON q.model_id = m.model_id
LEFT JOIN runner_keys AS k ON s.key_fingerprint = k.fingerprint
WHERE s.run_id = $1

-- name: files
SELECT name, sha256, octet_length(content) AS bytes FROM submission_files
WHERE run_id = $1 ORDER BY name

-- name: file_size
SELECT octet_length(content) FROM submission_files WHERE run_id = $1 AND name = $2

-- name: file_piece
-- A piece at a time: nobody's slow line holds 16 MiB of ours, or a connection.
SELECT substring(content FROM $3::int + 1 FOR $4::int) FROM submission_files
WHERE run_id = $1 AND name = $2

-- name: history
-- What admins decided about a result, oldest first.
SELECT at, actor, detail FROM audit
WHERE run_id = $1 AND action = 'result.state' ORDER BY audit_id

-- name: find_state
SELECT state FROM submissions WHERE run_id = $1

-- name: moderate
-- The former state is the guard: of two admins who saw the same one, the second changes nothing.
UPDATE submissions SET
    state = $3, state_reason = $4, state_changed_by = $5, state_changed_at = clock_timestamp()
WHERE run_id = $1 AND state = $2
RETURNING runner_id, state_changed_at
