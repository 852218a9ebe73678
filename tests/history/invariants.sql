-- Each query returns one row per violation, with its evidence; none is what we promise.
-- The names are what the checker prints. Those under "at rest" hold once a storm has settled, the
-- others at every instant.

-- name: a_claim_raises_the_fence_by_one
-- A claim is lease_seq + 1 and a lease_id never seen before; nothing else touches the fence.
SELECT h.run_id, h.step, h.old_status, h.new_status, h.old_seq, h.new_seq
FROM history AS h
WHERE
    h.old_status IS NOT NULL
    AND CASE WHEN h.new_status = 'CLAIMED' AND h.old_status <> 'CLAIMED'
        THEN h.new_seq <> h.old_seq + 1
            OR h.new_lease IS NULL
            OR EXISTS (
                SELECT FROM history AS e WHERE e.new_lease = h.new_lease AND e.step < h.step
            )
        ELSE h.new_seq <> h.old_seq
            OR (h.new_lease IS NOT NULL AND h.new_lease IS DISTINCT FROM h.old_lease)
            OR (h.new_lease IS NOT NULL AND h.new_holder IS DISTINCT FROM h.old_holder)
    END

-- name: only_legal_edges
-- The edges of leases.md, and staying where one is.
SELECT run_id, step, at, old_status, new_status FROM history
WHERE
    coalesce(old_status, 'nothing') <> new_status
    AND (coalesce(old_status, 'nothing'), new_status) NOT IN (
        ('nothing', 'PENDING'), ('PENDING', 'CLAIMED'), ('CLAIMED', 'IN_PROGRESS'),
        ('CLAIMED', 'PENDING'), ('IN_PROGRESS', 'PENDING'),
        ('PENDING', 'COMPLETE'), ('CLAIMED', 'COMPLETE'), ('IN_PROGRESS', 'COMPLETE'),
        ('CLAIMED', 'FAILED'), ('IN_PROGRESS', 'FAILED'),
        ('PENDING', 'CANCELLED'), ('CLAIMED', 'CANCELLED'), ('IN_PROGRESS', 'CANCELLED'),
        ('FAILED', 'PENDING'), ('CANCELLED', 'PENDING')
    )

-- name: no_live_lease_is_flipped_early
-- A lease that nobody handed back, ended, revoked or completed ends after its deadline.
SELECT h.run_id, h.step, h.old_seq AS lease_seq, h.at, h.old_deadline, a.how
FROM history AS h
LEFT JOIN attempts AS a ON h.run_id = a.run_id AND h.old_seq = a.lease_seq
WHERE
    h.old_status IN ('CLAIMED', 'IN_PROGRESS')
    AND h.new_status IN ('PENDING', 'FAILED', 'CANCELLED')
    AND h.at < h.old_deadline
    AND (
        a.how IS NULL OR a.how = 'lapsed'
        OR EXISTS (
            SELECT FROM audit AS t
            WHERE
                t.run_id = h.run_id AND t.action = 'lease.lapse'
                AND (t.detail ->> 'lease_seq')::bigint = h.old_seq
        )
    )

-- name: a_result_belongs_to_the_lease_that_completed
-- Run, submission and ledger tell of the same lease, runner and key, and the lease is the one that
-- the sender of the bundle held: the ledger's lease_id is the request's.
SELECT
    s.run_id, s.lease_seq, s.runner_id, h.new_seq AS completed_seq, h.old_holder, a.how,
    a.runner_id AS attempt_of
FROM submissions AS s
LEFT JOIN history AS h
    ON s.run_id = h.run_id AND h.new_status = 'COMPLETE' AND h.old_status <> 'COMPLETE'
LEFT JOIN attempts AS a ON s.run_id = a.run_id AND s.lease_seq = a.lease_seq
WHERE
    s.lease_seq IS DISTINCT FROM h.new_seq
    OR s.runner_id IS DISTINCT FROM h.old_holder
    OR s.runner_id IS DISTINCT FROM a.runner_id
    OR s.key_fingerprint IS DISTINCT FROM a.key_fingerprint
    OR a.lease_id IS DISTINCT FROM h.old_lease
    OR a.how IS DISTINCT FROM 'completed'
    OR EXISTS (
        SELECT FROM client_log AS c
        WHERE
            c.verb = 'submit' AND c.status = 201 AND c.run_id = s.run_id
            AND c.lease_id IS DISTINCT FROM a.lease_id
    )

-- name: one_result_per_run
-- COMPLETE once, with one submission of the same digest, its files and its metric rows.
SELECT q.run_id, q.status, q.result_sha256, s.result_sha256 AS stored, h.completions
FROM run_queue AS q
LEFT JOIN submissions AS s ON q.run_id = s.run_id
LEFT JOIN (
    SELECT run_id, count(*) AS completions FROM history
    WHERE new_status = 'COMPLETE' AND old_status <> 'COMPLETE'
    GROUP BY run_id
) AS h ON q.run_id = h.run_id
WHERE
    q.job IS NOT NULL
    AND CASE WHEN q.status = 'COMPLETE'
        THEN h.completions IS DISTINCT FROM 1
            OR q.result_sha256 IS DISTINCT FROM s.result_sha256
            OR s.model_metrics <> (
                SELECT count(*) FROM run_model_metrics AS m WHERE m.run_id = q.run_id
            )
            OR NOT EXISTS (
                SELECT FROM submission_files AS f
                WHERE
                    f.run_id = q.run_id AND f.name = 'result.json'
                    AND encode(sha256(f.content), 'hex') = q.result_sha256
            )
        ELSE
            h.completions IS NOT NULL OR s.run_id IS NOT NULL OR q.result_sha256 IS NOT NULL
            OR EXISTS (SELECT FROM run_model_metrics AS m WHERE m.run_id = q.run_id)
    END

-- name: an_acknowledged_submit_is_durable
-- Each receipt that a client saw is of the stored result.
SELECT c.run_id, c.runner_id, c.status, c.result_sha256, c.received_at, s.result_sha256 AS stored
FROM client_log AS c
LEFT JOIN submissions AS s ON c.run_id = s.run_id
WHERE
    c.verb = 'submit' AND c.status IN (200, 201)
    AND (
        s.result_sha256 IS DISTINCT FROM c.result_sha256
        OR s.result_sha256 IS DISTINCT FROM c.receipt_sha256
        OR s.receipt_id IS DISTINCT FROM c.receipt_id
        OR s.runner_id IS DISTINCT FROM c.runner_id
    )

-- name: one_created_receipt_per_run
-- 201 means that this very request was accepted: one set of bytes per run may hear it.
SELECT run_id, count(DISTINCT request) AS requests, count(DISTINCT result_sha256) AS digests
FROM client_log
WHERE verb = 'submit' AND status IN (200, 201)
GROUP BY run_id
HAVING count(DISTINCT result_sha256) > 1 OR count(*) FILTER (WHERE status = 201) > 1

-- name: leases_of_a_runner_stay_within_its_limit
-- $1 is the limit of keys that have none of their own.
WITH moves AS (
    SELECT step, at, run_id, new_holder AS runner_id, 1 AS change
    FROM history WHERE new_status = 'CLAIMED' AND old_status <> 'CLAIMED'
    UNION ALL
    SELECT step, at, run_id, old_holder, -1
    FROM history
    WHERE old_status IN ('CLAIMED', 'IN_PROGRESS') AND new_status NOT IN ('CLAIMED', 'IN_PROGRESS')
),

held AS (
    SELECT *, sum(change) OVER (PARTITION BY runner_id ORDER BY step) AS leases FROM moves
)

SELECT h.runner_id, h.run_id, h.step, h.at, h.leases
FROM held AS h
WHERE
    h.leases > (
        SELECT max(coalesce(k.max_leases, $1)) FROM runner_keys AS k
        WHERE k.runner_id = h.runner_id
    )

-- name: no_mutation_after_a_revocation
-- P6, by the database: a claim, heartbeat or result of a key after its revocation committed.
SELECT r.fingerprint, r.at AS revoked_at, h.run_id, h.step, h.at, h.old_status, h.new_status
FROM revocations AS r
INNER JOIN history AS h ON r.fingerprint = h.new_key AND h.at > r.at
WHERE
    h.new_status IN ('CLAIMED', 'IN_PROGRESS')
    OR (h.new_status = 'COMPLETE' AND h.old_status <> 'COMPLETE')

-- name: no_success_after_a_revocation_was_answered
-- P6, by the clients: what is sent after the admin heard "revoked" is refused.
SELECT c.verb, c.runner_id, c.run_id, c.sent_at, c.status, r.received_at AS revoked_at
FROM client_log AS c
INNER JOIN client_log AS r
    ON c.fingerprint = r.fingerprint AND r.verb = 'revoke' AND r.status = 200
WHERE
    c.verb IN ('claim', 'heartbeat', 'submit', 'register')
    AND c.status BETWEEN 200 AND 299 AND c.sent_at > r.received_at

-- name: every_claim_is_in_the_ledger
SELECT h.run_id, h.step, h.new_seq, h.new_holder, a.runner_id AS ledger_says
FROM history AS h
LEFT JOIN attempts AS a ON h.run_id = a.run_id AND h.new_seq = a.lease_seq
WHERE
    h.new_status = 'CLAIMED' AND h.old_status <> 'CLAIMED'
    AND (a.lease_id, a.runner_id, a.key_fingerprint)
    IS DISTINCT FROM (h.new_lease, h.new_holder, h.new_key)

-- name: every_ended_lease_is_in_the_ledger
-- A lease is open in the ledger exactly while its run is live under its number.
SELECT a.run_id, a.lease_seq, a.how, a.ended_at, q.status, q.lease_seq AS current_seq
FROM attempts AS a
INNER JOIN run_queue AS q ON a.run_id = q.run_id AND q.job IS NOT NULL
WHERE
    (a.ended_at IS NULL)
    <> (q.lease_seq = a.lease_seq AND q.status IN ('CLAIMED', 'IN_PROGRESS'))
    OR a.lease_seq > q.lease_seq
    OR a.ended_at < a.claimed_at

-- name: lapses_and_results_are_audited
-- The sweep and the submit leave their audit row in the transaction of the transition.
SELECT a.run_id, a.lease_seq, a.how
FROM attempts AS a
WHERE
    (a.how = 'lapsed' AND NOT EXISTS (
        SELECT FROM audit AS t
        WHERE
            t.run_id = a.run_id AND t.action = 'lease.lapse'
            AND (t.detail ->> 'lease_seq')::bigint = a.lease_seq
    ))
    OR (a.how = 'completed' AND NOT EXISTS (
        SELECT FROM audit AS t
        WHERE
            t.run_id = a.run_id AND t.action = 'submit.accept'
            AND (t.detail ->> 'lease_seq')::bigint = a.lease_seq
    ))

-- name: a_retried_claim_shows_the_same_lease
-- Two leases for one Idempotency-Key, the second given while the first still lived.
WITH granted AS (
    SELECT c.runner_id, c.claim_key, c.lease_id, min(c.sent_at) AS sent_at FROM client_log AS c
    WHERE c.verb = 'claim' AND c.status = 200 AND c.lease_id IS NOT NULL
    GROUP BY c.runner_id, c.claim_key, c.lease_id
),

lives AS (
    SELECT
        g.*,
        h.step AS began,
        (
            SELECT min(e.step) FROM history AS e
            WHERE
                e.run_id = h.run_id AND e.step > h.step
                AND e.new_status NOT IN ('CLAIMED', 'IN_PROGRESS')
        ) AS ended
    FROM granted AS g
    INNER JOIN history AS h
        ON g.lease_id = h.new_lease AND h.new_status = 'CLAIMED' AND h.old_status <> 'CLAIMED'
)

SELECT a.runner_id, a.claim_key, a.lease_id AS first_lease, b.lease_id AS second_lease
FROM lives AS a
INNER JOIN lives AS b
    ON a.runner_id = b.runner_id AND a.claim_key = b.claim_key AND a.began < b.began
WHERE a.ended IS NULL OR a.ended > b.began

-- name: a_retried_claim_is_not_refused_its_own_lease
-- lease_limit, while the lease of this very Idempotency-Key lived from the sending to the answer.
SELECT c.runner_id, c.claim_key, c.sent_at, c.received_at, g.lease_id
FROM client_log AS c
INNER JOIN client_log AS g
    ON
        c.runner_id = g.runner_id AND c.claim_key = g.claim_key AND g.verb = 'claim'
        AND g.status = 200 AND g.lease_id IS NOT NULL AND g.received_at < c.sent_at
INNER JOIN history AS h
    ON g.lease_id = h.new_lease AND h.new_status = 'CLAIMED' AND h.old_status <> 'CLAIMED'
WHERE
    c.verb = 'claim' AND c.code = 'lease_limit'
    AND NOT EXISTS (
        SELECT FROM history AS e
        WHERE
            e.run_id = h.run_id AND e.step > h.step AND e.at < c.received_at
            AND e.new_status NOT IN ('CLAIMED', 'IN_PROGRESS')
    )

-- name: a_lease_is_told_to_its_holder_only
-- The lease that a claim was answered with is this runner's and this key's, in the ledger too.
SELECT c.runner_id, c.run_id, c.lease_id, a.runner_id AS holder
FROM client_log AS c
LEFT JOIN attempts AS a ON c.lease_id = a.lease_id
WHERE
    c.verb = 'claim' AND c.status = 200 AND c.lease_id IS NOT NULL
    AND (a.runner_id, a.key_fingerprint, a.run_id)
    IS DISTINCT FROM (c.runner_id, c.fingerprint, c.run_id)

-- name: an_answered_heartbeat_renewed_the_lease
-- 200 means that the deadline moved between the sending and the answer. A crash of PostgreSQL may
-- lose a beat (synchronous_commit is off for it), and a beat's rows with it.
SELECT c.runner_id, c.run_id, c.lease_id, c.sent_at, c.received_at
FROM client_log AS c
WHERE
    c.verb = 'heartbeat' AND c.status = 200
    AND NOT EXISTS (
        SELECT FROM history AS h
        WHERE
            h.run_id = c.run_id AND h.new_lease = c.lease_id AND h.new_status = 'IN_PROGRESS'
            AND h.at BETWEEN c.sent_at AND c.received_at
    )
    AND NOT EXISTS (
        SELECT FROM fault_log AS f
        WHERE
            f.kind = 'postgres_crash'
            AND f.at BETWEEN c.sent_at - interval '1 second' AND c.received_at + interval '2 second'
    )

-- name: an_answered_handback_ended_its_own_lease
-- A release or failure that was answered 200 is in the ledger of the lease that it named.
SELECT c.verb, c.runner_id, c.run_id, c.lease_id, c.sent_at, a.how
FROM client_log AS c
LEFT JOIN attempts AS a ON c.lease_id = a.lease_id
WHERE
    c.verb IN ('release', 'fail') AND c.status = 200
    AND (
        a.runner_id IS DISTINCT FROM c.runner_id
        OR a.how IS NULL
        OR a.how NOT IN ('cancelled', CASE c.verb WHEN 'fail' THEN 'failed' ELSE 'released' END)
    )

-- name: a_lease_ends_by_a_request_that_names_it
-- A failure, a release that a runner gave a reason for, and a result: somebody who held the lease
-- asked for it, by its lease_id, and nobody asked for another one. (A sign-off, and a claim whose
-- answer was not delivered, release with reasons of the service's own.)
SELECT a.run_id, a.lease_seq, a.runner_id, a.how, a.detail
FROM attempts AS a
LEFT JOIN submissions AS s ON a.run_id = s.run_id AND a.lease_seq = s.lease_seq
WHERE
    (a.how IN ('failed', 'completed') OR (a.how = 'released' AND a.detail LIKE 'storm%'))
    AND NOT EXISTS (
        SELECT FROM client_sent AS c
        WHERE
            c.lease_id = a.lease_id AND c.runner_id = a.runner_id
            AND c.verb = CASE a.how
                WHEN 'failed' THEN 'fail' WHEN 'released' THEN 'release' ELSE 'submit'
            END
            AND (a.how <> 'completed' OR c.result_sha256 = s.result_sha256)
    )

-- name: an_acknowledged_enqueue_is_durable
SELECT c.run_id, c.received_at FROM client_log AS c
WHERE
    c.verb = 'enqueue' AND c.status = 201
    AND NOT EXISTS (SELECT FROM run_queue AS q WHERE q.run_id = c.run_id AND q.job IS NOT NULL)

-- name: no_internal_errors
-- A fault of ours is 503 with Retry-After, and never a 500.
SELECT verb, runner_id, run_id, sent_at, status, code FROM client_log WHERE status = 500

-- name: every_run_is_terminal
-- At rest: nothing is stuck.
SELECT run_id, status, attempt_count, claimed_by, lease_seq, lease_expires_at, retry_after
FROM run_queue
WHERE job IS NOT NULL AND status NOT IN ('COMPLETE', 'FAILED', 'CANCELLED')
