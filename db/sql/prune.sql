-- name: count_failed_runs
-- Archived runs that ended without a result more than $1 ago. Their row in upstream's `runs` stays,
-- so that a run_id is used once, for ever: an old request that is sent again cannot queue it anew.
SELECT count(*) AS found, min(r.completed_at) AS oldest FROM run_archive AS r
WHERE
    r.status <> 'COMPLETE' AND r.completed_at < statement_timestamp() - $1::interval
    AND NOT EXISTS (SELECT FROM submissions AS s WHERE s.run_id = r.run_id)

-- name: delete_failed_runs
-- With their attempts. One that is being requeued is locked, and passed over.
WITH old AS MATERIALIZED (
    SELECT r.run_id FROM run_archive AS r
    WHERE
        r.status <> 'COMPLETE' AND r.completed_at < statement_timestamp() - $1::interval
        AND NOT EXISTS (SELECT FROM submissions AS s WHERE s.run_id = r.run_id)
    ORDER BY r.completed_at
    LIMIT $2
    FOR UPDATE OF r SKIP LOCKED
),

gone AS (
    DELETE FROM run_archive AS r USING old AS o WHERE r.run_id = o.run_id
    RETURNING r.run_id
),

ledger AS (
    DELETE FROM attempts_archive AS a USING gone AS g WHERE a.run_id = g.run_id
)

SELECT count(*) FROM gone

-- name: count_ledgers
-- Attempts of archived runs whose result was accepted more than $1 ago.
SELECT count(*) AS found, min(a.ended_at) AS oldest FROM attempts_archive AS a
INNER JOIN run_archive AS r ON a.run_id = r.run_id
WHERE
    a.ended_at < statement_timestamp() - $1::interval
    AND r.status = 'COMPLETE' AND r.completed_at < statement_timestamp() - $1::interval

-- name: delete_ledgers
WITH old AS MATERIALIZED (
    SELECT a.run_id, a.lease_seq FROM attempts_archive AS a
    INNER JOIN run_archive AS r ON a.run_id = r.run_id
    WHERE
        a.ended_at < statement_timestamp() - $1::interval
        AND r.status = 'COMPLETE' AND r.completed_at < statement_timestamp() - $1::interval
    ORDER BY a.ended_at
    LIMIT $2
    FOR UPDATE OF a SKIP LOCKED
),

gone AS (
    DELETE FROM attempts_archive AS a USING old AS o
    WHERE a.run_id = o.run_id AND a.lease_seq = o.lease_seq
    RETURNING 1
)

SELECT count(*) FROM gone

-- name: count_refusals
-- Records of bundles that were refused more than $1 ago.
SELECT count(*) AS found, min(refused_at) AS oldest FROM submission_refusals
WHERE refused_at < statement_timestamp() - $1::interval

-- name: delete_refusals
WITH old AS MATERIALIZED (
    SELECT refusal_id FROM submission_refusals
    WHERE refused_at < statement_timestamp() - $1::interval
    ORDER BY refused_at
    LIMIT $2
    FOR UPDATE SKIP LOCKED
),

gone AS (
    DELETE FROM submission_refusals AS r USING old AS o WHERE r.refusal_id = o.refusal_id
    RETURNING 1
)

SELECT count(*) FROM gone

-- name: count_answers
-- Answers to admins' POSTs that were given more than $1 ago.
SELECT count(*) AS found, min(created_at) AS oldest FROM idempotency_keys
WHERE created_at < statement_timestamp() - $1::interval

-- name: delete_answers
WITH old AS MATERIALIZED (
    SELECT actor, idempotency_key FROM idempotency_keys
    WHERE created_at < statement_timestamp() - $1::interval
    ORDER BY created_at
    LIMIT $2
    FOR UPDATE SKIP LOCKED
),

gone AS (
    DELETE FROM idempotency_keys AS k USING old AS o
    WHERE k.actor = o.actor AND k.idempotency_key = o.idempotency_key
    RETURNING 1
)

SELECT count(*) FROM gone

-- name: count_nonces
-- Nonces of registrations that are refused by their age for more than $1.
SELECT count(*) AS found, min(keep_until) AS oldest FROM registration_nonces
WHERE keep_until < statement_timestamp() - $1::interval

-- name: delete_nonces
WITH old AS MATERIALIZED (
    SELECT fingerprint, nonce FROM registration_nonces
    WHERE keep_until < statement_timestamp() - $1::interval
    LIMIT $2
    FOR UPDATE SKIP LOCKED
),

gone AS (
    DELETE FROM registration_nonces AS n USING old AS o
    WHERE n.fingerprint = o.fingerprint AND n.nonce = o.nonce
    RETURNING 1
)

SELECT count(*) FROM gone

-- name: count_revoked_tokens
-- Revocations of tokens that are refused by their age for more than $1.
SELECT count(*) AS found, min(expires_at) AS oldest FROM revoked_tokens
WHERE expires_at < statement_timestamp() - $1::interval

-- name: delete_revoked_tokens
WITH old AS MATERIALIZED (
    SELECT jti FROM revoked_tokens
    WHERE expires_at < statement_timestamp() - $1::interval
    LIMIT $2
    FOR UPDATE SKIP LOCKED
),

gone AS (
    DELETE FROM revoked_tokens AS t USING old AS o WHERE t.jti = o.jti
    RETURNING 1
)

SELECT count(*) FROM gone
