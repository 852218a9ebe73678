-- name: record
-- Nothing is written for an admin whose token ($7) has ended since the request began: its transaction
-- is then rolled back, and a revocation bites whatever a request has waited for.
INSERT INTO audit (actor, action, target, address, run_id, runner_id, token_id, detail)
SELECT $1, $2, $3, $4, $5, $6, $7, $8
WHERE
    $7::uuid IS NULL
    OR EXISTS (
        SELECT FROM admin_tokens
        WHERE
            token_id = $7 AND revoked_at IS NULL
            AND (expires_at IS NULL OR expires_at > clock_timestamp())
    )

-- name: look
-- The head of the chain, and whether there are rows to be chained.
SELECT
    c.seq, c.hash, EXISTS (SELECT FROM audit_unchained) AS more
FROM (VALUES (0)) AS one (n)
LEFT JOIN (SELECT seq, hash FROM audit_chain ORDER BY seq DESC LIMIT 1) AS c ON true

-- name: lock_chain
-- One writer of the chain at a time, in all processes; the others leave it to that one.
SELECT pg_try_advisory_xact_lock(hashtext('bakeoff_queue.audit_chain'))

-- name: take_unchained
-- Up to $1 rows that are to be chained, the oldest first. A row that is gone is chained as such.
WITH taken AS (
    DELETE FROM audit_unchained
    WHERE
        audit_id = any(
            ARRAY(SELECT u.audit_id FROM audit_unchained AS u ORDER BY u.audit_id LIMIT $1)
        )
    RETURNING audit_id
)

SELECT
    t.audit_id AS taken, a.audit_id, a.at, a.actor, a.action, a.target, a.address, a.token_id,
    a.run_id, a.runner_id, a.detail
FROM taken AS t LEFT JOIN audit AS a ON t.audit_id = a.audit_id
ORDER BY t.audit_id

-- name: chain
INSERT INTO audit_chain (seq, audit_id, hash)
SELECT * FROM unnest($1::bigint [], $2::bigint [], $3::bytea [])

-- name: newest
-- When an action was last done.
SELECT at FROM audit WHERE action = $1 ORDER BY audit_id DESC LIMIT 1

-- name: list_page
-- One page of the trail, newest first, before the cursor ($1): of an actor ($2), an action ($3), a run
-- ($4) or a runner ($5).
SELECT
    a.audit_id, a.at, a.actor, a.action, a.target, a.address, a.token_id, a.run_id, a.runner_id,
    a.detail, c.seq, c.hash
FROM audit AS a
LEFT JOIN audit_chain AS c ON a.audit_id = c.audit_id
WHERE
    ($1::bigint IS NULL OR a.audit_id < $1)
    AND ($2::text IS NULL OR a.actor = $2)
    AND ($3::text IS NULL OR a.action = $3)
    AND ($4::uuid IS NULL OR a.run_id = $4)
    AND ($5::text IS NULL OR a.runner_id = $5)
ORDER BY a.audit_id DESC
LIMIT $6

-- name: chain_page
-- $2 entries of the chain after $1, each with its row, if that is still there.
SELECT
    c.seq, c.hash, c.audit_id AS chained, a.audit_id, a.at, a.actor, a.action, a.target, a.address,
    a.token_id, a.run_id, a.runner_id, a.detail
FROM (SELECT * FROM audit_chain WHERE seq > $1 ORDER BY seq LIMIT $2) AS c
LEFT JOIN audit AS a ON c.audit_id = a.audit_id
ORDER BY c.seq

-- name: unchained_page
-- Rows that are in no entry, of those after $1 and up to $2 (NULL: to the end).
SELECT
    a.audit_id, a.at, a.actor, a.action, a.target, a.address, a.token_id, a.run_id, a.runner_id,
    a.detail
FROM audit AS a
WHERE
    a.audit_id > $1 AND ($2::bigint IS NULL OR a.audit_id <= $2)
    AND NOT EXISTS (SELECT FROM audit_chain AS c WHERE c.audit_id = a.audit_id)
ORDER BY a.audit_id
LIMIT $3

-- name: chained_at
SELECT audit_id FROM audit_chain WHERE seq = $1
