-- name: claim
-- Hand runs to all requests that wait together, one run each, in one statement: requests of equal
-- capabilities are a kind ($1 VRAM in GB, $2 quantizations, a comma between them), and each request
-- names its kind ($7, from 1). Returns a row per request, in order, whether it got a run or not.
WITH RECURSIVE requests AS (
    SELECT *
    FROM
        unnest(
            $3::text [], $4::text [], $5::text [], $6::text [], $7::int [], $12::uuid [],
            $13::uuid []
        ) WITH ORDINALITY
        AS r (runner_id, fingerprint, claim_key, claim_digest, kind, token, instance_id, place)
),

-- The key rows are locked so that no claim slips past a revocation that commits at the same time:
-- a revocation in flight makes this wait, and PostgreSQL then reads the row again, by its newest
-- version. Without the lock this statement's snapshot would still show the key as good, and the
-- revocation would not see the lease. Likewise a sign-off: what it ended stands in the key's row.
keys AS MATERIALIZED (
    SELECT
        *,
        revoked_at IS NULL AND (not_after IS NULL OR not_after > clock_timestamp()) AS good
    FROM runner_keys
    WHERE fingerprint = any($4)
    FOR SHARE
),

-- The requests whose key is good.
admitted AS MATERIALIZED (
    SELECT r.*, coalesce(k.max_leases, $9) AS max_leases
    FROM requests AS r
    INNER JOIN keys AS k
        ON r.fingerprint = k.fingerprint AND k.good AND r.token <> all(k.ended_tokens)
),

-- A claim sent again, while its lease lives, gets that lease and nothing new. Only by a
-- good key: a revocation that was waited for above has ended the lease this snapshot still shows.
replayed AS (
    SELECT r.place, q.queue_id
    FROM admitted AS r
    CROSS JOIN LATERAL (
        SELECT q.queue_id FROM run_queue AS q
        WHERE q.claimed_by = r.runner_id AND q.claim_key = r.claim_key
        OFFSET 0 -- a probe each: as a join it may become a merge with the keys of all leases
    ) AS q
),

-- A runner's lowest free lease slot. Two claims of one runner in two processes may see the same
-- free slot; the unique index lets one of them through and the other looks again.
entitled AS MATERIALIZED (
    SELECT
        r.*, s.slot, d.avoided,
        row_number() OVER (PARTITION BY r.kind, d.avoided ORDER BY r.place) AS turn
    FROM admitted AS r
    INNER JOIN runners AS u
        ON
            r.runner_id = u.runner_id
            AND NOT is_paused(u.paused_at, u.paused_until) AND u.drain_requested_at IS NULL
    CROSS JOIN LATERAL (
        SELECT slot FROM generate_series(1, r.max_leases) AS slot
        WHERE NOT EXISTS (
            SELECT FROM run_queue AS q
            WHERE q.claimed_by = r.runner_id AND q.lease_slot = slot
        )
        ORDER BY slot LIMIT 1
    ) AS s
    -- Runs that the runner failed: not again before the time it asked for, nor while another runner
    -- could take them. Only the newest are read, or a patient runner could make its claims dear.
    CROSS JOIN LATERAL (
        SELECT coalesce(array_agg(q.queue_id ORDER BY q.queue_id), '{}') AS avoided
        FROM (
            SELECT run_id, until FROM run_deferrals
            WHERE runner_id = r.runner_id
            ORDER BY failed_at DESC LIMIT 64
        ) AS f
        CROSS JOIN LATERAL (
            SELECT queue_id FROM run_queue
            WHERE run_id = f.run_id AND job IS NOT NULL AND status = 'PENDING'
            OFFSET 0 -- a probe each, and no scan of the queue
        ) AS q
        WHERE f.until > clock_timestamp() OR another_fits(f.run_id, r.runner_id)
    ) AS d
    WHERE r.place NOT IN (SELECT place FROM replayed)
),

-- The kinds that are entitled to something, the one that came first first. Runners that have to
-- avoid runs are a kind of their own.
kinds AS MATERIALIZED (
    SELECT
        e.kind, e.avoided, k.vram_gb, string_to_array(k.quantizations, ',') AS quantizations,
        count(*) AS asked, row_number() OVER (ORDER BY min(e.place)) AS step
    FROM entitled AS e
    INNER JOIN unnest($1::int [], $2::text []) WITH ORDINALITY AS k (vram_gb, quantizations, kind)
        ON e.kind = k.kind
    GROUP BY e.kind, e.avoided, k.vram_gb, k.quantizations
),

pauses AS MATERIALIZED (
    SELECT model_id FROM queue_pauses WHERE is_paused(paused_at, until)
),

queues AS MATERIALIZED (
    SELECT
        w.*, m.quantization, j.quantization AS judge_quantization,
        greatest(m.need_gb, j.need_gb) AS need_gb
    FROM queue_heads() AS w
    INNER JOIN model_vram AS m ON w.model_id = m.model_id
    INNER JOIN model_vram AS j ON w.judge_model_id = j.model_id
    WHERE
        EXISTS (SELECT FROM kinds)
        AND NOT EXISTS (
            SELECT FROM pauses AS p
            WHERE p.model_id IS NULL OR p.model_id IN (w.model_id, w.judge_model_id)
        )
),

-- One kind after the other, each from what those before it have left.
rounds (step, found, chosen, taken) AS (
    SELECT 0::bigint, 0, '{}'::uuid [], '{}'::uuid []
    UNION ALL
    SELECT k.step, cardinality(h.heads), c.chosen, r.taken || c.chosen
    FROM rounds AS r
    INNER JOIN kinds AS k ON k.step = r.step + 1
    -- The head of each fitting model's queue, and what has come due of its deferred runs; more than
    -- is asked for, as rows that another process locks at this moment are passed over below. The
    -- time is the statement's: one that moves on (clock_timestamp) has no place in an index.
    CROSS JOIN LATERAL (
        SELECT ARRAY(
            WITH fitting AS (
                SELECT f.* FROM queues AS f
                WHERE
                    f.need_gb <= k.vram_gb AND f.quantization = any(k.quantizations)
                    AND f.judge_quantization = any(k.quantizations)
            ),

            -- Only a model whose first run is among the best can have one of the best. First runs
            -- that a kind before this one took count too, so as many more are looked at. A model
            -- that has only deferred runs is the last here (NULL) and finds none below.
            best AS (
                SELECT f.* FROM fitting AS f
                ORDER BY
                    f.priority, CASE WHEN $11 THEN f.need_gb END DESC, f.created_at, f.queue_id
                LIMIT 2 * k.asked + 16 + cardinality(r.taken) + cardinality(k.avoided)
            )

            SELECT h.queue_id
            FROM (
                SELECT q.queue_id, q.priority, q.created_at, f.need_gb
                FROM best AS f
                CROSS JOIN LATERAL (
                    SELECT q.queue_id, q.priority, q.created_at
                    FROM run_queue AS q
                    WHERE
                        q.model_id = f.model_id AND q.judge_model_id = f.judge_model_id
                        AND q.status = 'PENDING' AND q.job IS NOT NULL
                        AND q.retry_after IS NULL AND q.queue_id <> all(r.taken || k.avoided)
                        AND (q.priority, q.created_at, q.queue_id)
                        >= (f.priority, f.created_at, f.queue_id)
                    ORDER BY q.priority, q.created_at, q.queue_id
                    LIMIT 2 * k.asked + 16
                ) AS q
                UNION ALL
                SELECT q.queue_id, q.priority, q.created_at, f.need_gb
                FROM fitting AS f
                CROSS JOIN LATERAL (
                    SELECT q.queue_id, q.priority, q.created_at
                    FROM run_queue AS q
                    WHERE
                        q.model_id = f.model_id AND q.judge_model_id = f.judge_model_id
                        AND q.status = 'PENDING' AND q.job IS NOT NULL
                        AND q.retry_after <= statement_timestamp()
                        AND q.queue_id <> all(r.taken || k.avoided)
                    ORDER BY q.retry_after
                    LIMIT 2 * k.asked + 16
                ) AS q
                WHERE f.due
            ) AS h
            ORDER BY
                h.priority, CASE WHEN $11 THEN h.need_gb END DESC, h.created_at, h.queue_id
            LIMIT 2 * k.asked + 16
        ) AS heads
        OFFSET 0 -- looked up once, and not at each place that names it
    ) AS h
    -- Locked with the LIMIT inside, before anything is updated: as a subquery of the UPDATE
    -- (WHERE queue_id IN (SELECT ... LIMIT n FOR UPDATE SKIP LOCKED)) the planner may run it more
    -- than once and update more than n rows.
    CROSS JOIN LATERAL (
        SELECT ARRAY(
            SELECT q.queue_id
            FROM unnest(h.heads) WITH ORDINALITY AS i (queue_id, place)
            INNER JOIN run_queue AS q ON i.queue_id = q.queue_id
            WHERE
                q.status = 'PENDING' -- and not failed by another, and deferred, meanwhile
                AND (q.retry_after IS NULL OR q.retry_after <= statement_timestamp())
            ORDER BY i.place
            LIMIT k.asked
            FOR UPDATE OF q SKIP LOCKED
        ) AS chosen
        OFFSET 0
    ) AS c
),

assigned AS (
    SELECT e.*, c.queue_id
    FROM rounds AS r
    CROSS JOIN LATERAL unnest(r.chosen) WITH ORDINALITY AS c (queue_id, turn)
    INNER JOIN kinds AS k ON r.step = k.step
    INNER JOIN entitled AS e ON k.kind = e.kind AND k.avoided = e.avoided AND c.turn = e.turn
),

taken AS (
    UPDATE run_queue AS q SET
        status = 'CLAIMED',
        claimed_by = a.runner_id,
        claimed_at = clock_timestamp(),
        started_at = NULL,
        lease_seq = q.lease_seq + 1,
        lease_id = gen_random_uuid(),
        lease_key = a.fingerprint,
        lease_instance = a.instance_id,
        lease_expires_at = clock_timestamp()
            + least($8::interval, coalesce(q.max_runtime_s, $10) * interval '1 second'),
        lease_slot = a.slot,
        last_heartbeat = NULL,
        progress = NULL,
        claim_key = a.claim_key,
        claim_digest = a.claim_digest,
        retry_after = NULL,
        updated_at = clock_timestamp()
    FROM assigned AS a
    WHERE q.queue_id = a.queue_id
    RETURNING a.place, q.*
),

ledger AS (
    INSERT INTO attempts (run_id, lease_seq, lease_id, runner_id, key_fingerprint, claimed_at)
    SELECT run_id, lease_seq, lease_id, claimed_by, lease_key, claimed_at FROM taken
),

-- Given again, the lease is marked as touched: the undo of an answer that was lost on the way (see
-- `release`, $6) must not take it away from whoever just received it here.
replayed_leases AS (
    UPDATE run_queue AS q SET lease_instance = s.instance_id, updated_at = clock_timestamp()
    FROM replayed AS r INNER JOIN requests AS s ON r.place = s.place
    WHERE q.queue_id = r.queue_id AND q.claimed_by = s.runner_id AND q.claim_key = s.claim_key
    RETURNING r.place, q.*
),

granted AS (
    SELECT t.*, t.updated_at AS granted_at FROM taken AS t
    UNION ALL
    SELECT a.*, NULL FROM replayed_leases AS a
),

described AS (
    SELECT
        m.model_id,
        jsonb_build_object(
            'name', m.name,
            'model_id', m.model_id,
            'quantization', x.name,
            'parameter_count_b', m.parameter_count_b,
            'active_parameter_count_b', coalesce(m.active_parameter_count_b, m.parameter_count_b),
            'architecture', c.name,
            'file_format', f.name,
            'model_hash', m.model_hash,
            'sources', (
                SELECT coalesce(jsonb_agg(
                    jsonb_build_object('source_type', y.name, 'url', s.url) ORDER BY s.source_id
                ), '[]')
                FROM model_sources AS s
                INNER JOIN source_types AS y ON s.source_type_id = y.source_type_id
                WHERE s.model_id = m.model_id
            )
        ) AS model
    FROM (SELECT DISTINCT model_id FROM granted) AS g
    INNER JOIN models AS m ON g.model_id = m.model_id
    INNER JOIN quantization_methods AS x ON m.quantization_id = x.quantization_id
    LEFT JOIN model_architectures AS c ON m.architecture_id = c.architecture_id
    LEFT JOIN model_file_formats AS f ON m.file_format_id = f.file_format_id
)

SELECT
    r.place,
    k.fingerprint IS NOT NULL AS key_known,
    coalesce(k.good, false) AS key_good,
    k.good AND r.token = any(k.ended_tokens) AS token_ended,
    is_paused(u.paused_at, u.paused_until) AS paused,
    u.pause_reason,
    u.drain_requested_at IS NOT NULL AS draining,
    e.place IS NOT NULL AS entitled,
    -- Fewer than were there and asked for: others held the rows, or just ended a lease that was to
    -- be given again, so look again.
    EXISTS (
        SELECT FROM rounds AS c INNER JOIN kinds AS k ON c.step = k.step
        WHERE cardinality(c.chosen) < least(k.asked, c.found)
    )
    OR (SELECT count(*) FROM replayed_leases) < (SELECT count(*) FROM replayed) AS contended,
    g.queue_id, g.run_id, g.lease_seq, g.lease_id, g.lease_expires_at, g.claim_digest,
    g.granted_at, -- null when the lease was given before
    g.granted_at - greatest(g.created_at, g.requeued_at) AS waited,
    g.claimed_by AS holder, g.lease_key AS holder_key, g.lease_instance AS holder_instance,
    g.lease_expires_at - clock_timestamp() AS remaining,
    -- The rest of the answer as text: it is handed on, and nobody on the way reads it.
    CASE WHEN g.queue_id IS NOT NULL THEN (
        g.job || jsonb_build_object(
            'max_runtime_s', coalesce(g.max_runtime_s, $10),
            'model', d.model,
            'signature_policy', k.signature_policy,
            'expected_signer', CASE WHEN k.signer_identity IS NOT NULL THEN
                jsonb_build_object('identity', k.signer_identity, 'issuer', k.signer_issuer)
            END,
            'previous_attempts', CASE WHEN g.lease_seq = 1 THEN '[]' ELSE (
                SELECT coalesce(jsonb_agg(
                    jsonb_build_object(
                        'ended', to_char(p.ended_at, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
                        'how', p.how, 'progress', p.progress
                    ) ORDER BY p.lease_seq
                ), '[]')
                FROM ( -- the newest: a run may be claimed and released without end
                    SELECT * FROM attempts AS b
                    WHERE b.run_id = g.run_id AND b.lease_seq < g.lease_seq
                    ORDER BY b.lease_seq DESC LIMIT 20
                ) AS p
            ) END
        )
    )::text END AS members
FROM requests AS r
LEFT JOIN keys AS k ON r.fingerprint = k.fingerprint
LEFT JOIN runners AS u ON r.runner_id = u.runner_id
LEFT JOIN entitled AS e ON r.place = e.place
LEFT JOIN granted AS g ON r.place = g.place
LEFT JOIN described AS d ON g.model_id = d.model_id
ORDER BY r.place

-- name: avoided_by
-- The PENDING runs that a runner failed and is not given now, and until when it asked not to be; null
-- when it waits only for others to take them.
SELECT q.run_id, CASE WHEN d.until > clock_timestamp() THEN d.until END AS until
FROM (
    SELECT run_id, until FROM run_deferrals
    WHERE runner_id = $1
    ORDER BY failed_at DESC LIMIT 64
) AS d
INNER JOIN run_queue AS q ON d.run_id = q.run_id AND q.status = 'PENDING' AND q.job IS NOT NULL
WHERE d.until > clock_timestamp() OR another_fits(d.run_id, $1)

-- name: promote_aged
-- Bring up to $2 runs to the front that better or equal ones overtake which were added more than $1
-- later, the oldest first: no flow of urgent runs keeps the others waiting for ever. Only the first run
-- of each model, judge and priority is looked at, an index probe each.
WITH RECURSIVE heads AS (
    (
        SELECT model_id, judge_model_id, priority, created_at, queue_id FROM run_queue
        WHERE status = 'PENDING' AND job IS NOT NULL AND retry_after IS NULL
        ORDER BY model_id, judge_model_id, priority, created_at, queue_id LIMIT 1
    )
    UNION ALL
    SELECT n.* FROM heads AS h
    CROSS JOIN LATERAL (
        SELECT model_id, judge_model_id, priority, created_at, queue_id FROM run_queue
        WHERE
            status = 'PENDING' AND job IS NOT NULL AND retry_after IS NULL
            AND (model_id, judge_model_id, priority)
            > (h.model_id, h.judge_model_id, h.priority)
        ORDER BY model_id, judge_model_id, priority, created_at, queue_id LIMIT 1
    ) AS n
),

overtaken AS (
    SELECT h.queue_id, min(o.priority) AS priority
    FROM heads AS h
    INNER JOIN heads AS o
        ON h.priority >= o.priority AND o.created_at > h.created_at + $1::interval
    GROUP BY h.queue_id, h.created_at
    ORDER BY h.created_at
    LIMIT $2
)

UPDATE run_queue AS q SET priority = o.priority - 1
FROM overtaken AS o
WHERE q.queue_id = o.queue_id AND q.status = 'PENDING'
RETURNING q.run_id, q.priority

-- name: take_over
-- A live lease of a runner ($2, $3) goes to its process $4, whichever had it, and lives on. Under
-- another lease_id, so that two processes never work for one lease: what the old one sends from now on
-- is refused. A process that has the lease keeps it: this request may be sent again. Returns the key
-- under which `claim` gives the lease again, $5 for one that was taken over.
WITH held AS MATERIALIZED (
    SELECT q.*, q.lease_instance IS DISTINCT FROM $4 AS other FROM run_queue AS q
    INNER JOIN runner_keys AS k
        ON
            k.fingerprint = $3 AND k.revoked_at IS NULL AND $8 <> all(k.ended_tokens)
            AND (k.not_after IS NULL OR k.not_after > clock_timestamp())
    WHERE
        q.run_id = $1 AND q.job IS NOT NULL AND q.claimed_by = $2
        AND q.status IN ('CLAIMED', 'IN_PROGRESS')
    FOR UPDATE OF q
),

given AS (
    UPDATE run_queue AS q SET
        lease_id = CASE WHEN h.other THEN gen_random_uuid() ELSE q.lease_id END,
        lease_instance = $4,
        lease_key = $3,
        lease_expires_at = least(
            clock_timestamp() + $6::interval,
            q.claimed_at + coalesce(q.max_runtime_s, $7) * interval '1 second'
        ),
        claim_key = CASE WHEN h.other THEN $5 ELSE q.claim_key END,
        claim_digest = CASE WHEN h.other THEN '' ELSE q.claim_digest END,
        updated_at = clock_timestamp()
    FROM held AS h
    WHERE q.queue_id = h.queue_id
    RETURNING
        q.run_id, q.lease_seq, q.lease_id, q.claim_key, h.other, h.lease_instance AS former
),

ledger AS (
    UPDATE attempts AS a SET lease_id = g.lease_id FROM given AS g
    WHERE a.run_id = g.run_id AND a.lease_seq = g.lease_seq AND g.other
),

audited AS (
    INSERT INTO audit (actor, action, target, run_id, runner_id, detail)
    SELECT
        'runner:' || $2, 'lease.resume', 'run:' || run_id, run_id, $2,
        jsonb_build_object('lease_seq', lease_seq, 'from', former, 'instance_id', $4::uuid)
    FROM given WHERE other
)

SELECT claim_key FROM given

-- name: held_by
-- The live leases of a runner.
SELECT run_id, lease_id, lease_expires_at, lease_seq, queue_id, status, lease_instance
FROM run_queue
WHERE claimed_by = $1 AND status IN ('CLAIMED', 'IN_PROGRESS') AND job IS NOT NULL
ORDER BY claimed_at

-- name: promote_due
-- Deferred runs whose time has come take their place in the queue's order, up to $1 of them. Until
-- then a claim finds them all the same, the earliest due first.
UPDATE run_queue SET retry_after = NULL
WHERE queue_id IN (
    SELECT queue_id FROM run_queue
    WHERE
        status = 'PENDING' AND job IS NOT NULL AND retry_after <= statement_timestamp()
    LIMIT $1
    FOR UPDATE SKIP LOCKED
)

-- name: offers
-- What the queue has, by model and judge: the need, and how many of its runs may be claimed now or only
-- later, each counted up to $1: what this costs does not grow with the queue.
SELECT
    m.name AS model_name,
    m.quantization,
    CASE WHEN j.model_id <> m.model_id THEN j.name END AS judge_name,
    j.quantization AS judge_quantization,
    greatest(m.need_gb, j.need_gb) AS need_gb,
    r.runs + d.runs AS claimable,
    l.runs AS deferred,
    l.next_retry,
    l.next_retry - statement_timestamp() AS due_in,
    pause_of(w.model_id, w.judge_model_id) AS pause_reason
FROM queue_heads() AS w
INNER JOIN model_vram AS m ON w.model_id = m.model_id
INNER JOIN model_vram AS j ON w.judge_model_id = j.model_id
CROSS JOIN LATERAL (
    SELECT count(*) AS runs FROM (
        SELECT FROM run_queue AS q
        WHERE
            q.model_id = w.model_id AND q.judge_model_id = w.judge_model_id
            AND q.status = 'PENDING' AND q.job IS NOT NULL
            AND q.retry_after IS NULL
        LIMIT $1
    ) AS ready
) AS r
CROSS JOIN LATERAL (
    SELECT count(*) AS runs FROM (
        SELECT FROM run_queue AS q
        WHERE
            q.model_id = w.model_id AND q.judge_model_id = w.judge_model_id
            AND q.status = 'PENDING' AND q.job IS NOT NULL
            AND q.retry_after <= statement_timestamp()
        LIMIT $1
    ) AS due
) AS d
CROSS JOIN LATERAL (
    SELECT count(*) AS runs, min(later.retry_after) AS next_retry FROM (
        SELECT q.retry_after FROM run_queue AS q
        WHERE
            q.model_id = w.model_id AND q.judge_model_id = w.judge_model_id
            AND q.status = 'PENDING' AND q.job IS NOT NULL
            AND q.retry_after > statement_timestamp()
        ORDER BY q.retry_after
        LIMIT $1
    ) AS later
) AS l
ORDER BY need_gb, m.name, m.quantization, j.name

-- name: beat
-- Renew the leases of all heartbeats that wait together; the first one of a lease starts the run.
-- The guard is the whole claim to the run: its secret, its holder, a live state and a good key.
-- A lease that is overdue but not yet swept is revived. A lost heartbeat is sent again, so this
-- one statement need not wait for the disk.
UPDATE run_queue AS q SET
    status = 'IN_PROGRESS',
    started_at = coalesce(q.started_at, clock_timestamp()),
    last_heartbeat = clock_timestamp(),
    lease_expires_at = least(
        clock_timestamp() + $6::interval,
        q.claimed_at + coalesce(q.max_runtime_s, $7) * interval '1 second'
    ),
    progress = coalesce(b.progress, q.progress),
    lease_instance = b.instance_id, -- who works on it holds it
    updated_at = clock_timestamp()
FROM unnest($1::uuid [], $2::uuid [], $3::text [], $4::text [], $5::jsonb [], $8::uuid [])
    WITH ORDINALITY AS b (run_id, lease_id, runner_id, fingerprint, progress, instance_id, place)
INNER JOIN runner_keys AS k
    ON
        b.fingerprint = k.fingerprint AND k.revoked_at IS NULL
        AND (k.not_after IS NULL OR k.not_after > clock_timestamp())
INNER JOIN runners AS u ON b.runner_id = u.runner_id
CROSS JOIN set_config('synchronous_commit', 'off', true)
WHERE
    q.run_id = b.run_id AND q.job IS NOT NULL
    AND q.lease_id = b.lease_id
    AND q.claimed_by = b.runner_id
    AND q.status IN ('CLAIMED', 'IN_PROGRESS')
RETURNING
    b.place, q.queue_id, q.lease_seq, q.lease_expires_at,
    q.lease_expires_at - clock_timestamp() AS remaining,
    q.cancel_requested_at IS NOT NULL AS cancel_requested, q.cancel_reason,
    -- The run nears its longest life, which no heartbeat extends: a TTL ahead, or the last quarter
    -- of a short one.
    q.claimed_at + coalesce(q.max_runtime_s, $7) * interval '1 second'
    <= clock_timestamp()
    + least($6::interval, coalesce(q.max_runtime_s, $7) * interval '0.25 second') AS last_call,
    u.drain_requested_at IS NOT NULL AS draining

-- name: release
-- Hand a lease back: no attempt is burnt. A run whose cancel was asked for ends here. With $6, only
-- a lease that nobody has been given again, nor has beaten for, since that update of the row.
-- A runner can claim and release for ever, so of a run's leases older than its newest $7 those that
-- were released are forgotten: they changed nothing, and failures and lapses are few.
-- By the process that holds the lease ($8), or by a newer one which nobody has beaten beside: what it
-- finds may be left from before a restart.
WITH held AS MATERIALIZED (
    SELECT q.* FROM run_queue AS q
    INNER JOIN runner_keys AS k ON k.fingerprint = $4 AND k.revoked_at IS NULL
    INNER JOIN runners AS u ON q.claimed_by = u.runner_id
    WHERE
        q.run_id = $1 AND q.job IS NOT NULL AND q.lease_id = $2 AND q.claimed_by = $3
        AND q.status IN ('CLAIMED', 'IN_PROGRESS')
        AND ($6::timestamptz IS NULL OR q.updated_at = $6)
        AND (
            q.lease_instance = $8
            OR u.instance_id = $8 AND coalesce(q.last_heartbeat, q.claimed_at) < u.started_at
        )
    FOR UPDATE OF q
),

freed AS (
    UPDATE run_queue AS q SET
        status = CASE WHEN h.cancel_requested_at IS NULL THEN 'PENDING' ELSE 'CANCELLED' END,
        completed_at = CASE WHEN h.cancel_requested_at IS NOT NULL THEN clock_timestamp() END,
        lease_id = NULL, lease_key = NULL, lease_expires_at = NULL, lease_slot = NULL,
        claim_key = NULL, claim_digest = NULL, claimed_by = NULL, claimed_at = NULL,
        started_at = NULL, updated_at = clock_timestamp()
    FROM held AS h
    WHERE q.queue_id = h.queue_id
    RETURNING q.queue_id, q.run_id, q.lease_seq, q.status
),

ledger AS (
    UPDATE attempts AS a SET
        ended_at = clock_timestamp(),
        how = CASE WHEN h.cancel_requested_at IS NULL THEN 'released' ELSE 'cancelled' END,
        detail = $5, started_at = h.started_at, last_heartbeat = h.last_heartbeat,
        progress = h.progress, outcome = jsonb_build_object('status', f.status)
    FROM held AS h INNER JOIN freed AS f ON h.queue_id = f.queue_id
    WHERE a.run_id = h.run_id AND a.lease_seq = h.lease_seq
),

-- Taken from its runner, who was asked to give it back.
audited AS (
    INSERT INTO audit (actor, action, target, run_id, runner_id, detail)
    SELECT
        'system', 'lease.cancel', 'run:' || h.run_id, h.run_id, $3,
        jsonb_build_object('lease_seq', h.lease_seq, 'reason', h.cancel_reason)
    FROM held AS h WHERE h.cancel_requested_at IS NOT NULL
),

forgotten AS (
    DELETE FROM attempts AS a USING freed AS f
    WHERE a.run_id = f.run_id AND a.lease_seq <= f.lease_seq - $7::int AND a.how = 'released'
)

SELECT queue_id, lease_seq, status, pg_notify('bakeoff_queue', '') FROM freed

-- name: fail
-- End a lease by a failure the runner reports: the attempt counts, the run waits longer each time
-- and goes further back in the queue (upstream's rule), and is FAILED when its attempts are used up.
-- By the process that holds the lease ($9), as in `release`.
WITH held AS MATERIALIZED (
    SELECT q.*, q.attempt_count + 1 AS failures FROM run_queue AS q
    INNER JOIN runner_keys AS k ON k.fingerprint = $4 AND k.revoked_at IS NULL
    INNER JOIN runners AS u ON q.claimed_by = u.runner_id
    WHERE
        q.run_id = $1 AND q.job IS NOT NULL AND q.lease_id = $2 AND q.claimed_by = $3
        AND q.status IN ('CLAIMED', 'IN_PROGRESS')
        AND (
            q.lease_instance = $9
            OR u.instance_id = $9 AND coalesce(q.last_heartbeat, q.claimed_at) < u.started_at
        )
    FOR UPDATE OF q
),

ruled AS (
    SELECT
        h.*,
        CASE
            WHEN h.cancel_requested_at IS NOT NULL THEN 'CANCELLED'
            WHEN h.failures >= h.max_attempts THEN 'FAILED'
            ELSE 'PENDING'
        END AS next_status
    FROM held AS h
),

freed AS (
    UPDATE run_queue AS q SET
        status = r.next_status,
        attempt_count = CASE
            WHEN r.next_status = 'CANCELLED' THEN q.attempt_count ELSE r.failures
        END,
        priority = q.priority + CASE WHEN r.next_status = 'PENDING' THEN 5 * r.failures ELSE 0 END,
        retry_after = CASE WHEN r.next_status = 'PENDING'
            THEN clock_timestamp() + $7 * r.failures * interval '1 second'
        END,
        completed_at = CASE WHEN r.next_status <> 'PENDING' THEN clock_timestamp() END,
        error_detail = $5 || ': ' || $6,
        lease_id = NULL, lease_key = NULL, lease_expires_at = NULL, lease_slot = NULL,
        claim_key = NULL, claim_digest = NULL, claimed_by = NULL, claimed_at = NULL,
        started_at = NULL, updated_at = clock_timestamp()
    FROM ruled AS r
    WHERE q.queue_id = r.queue_id
    RETURNING q.queue_id, q.run_id, q.lease_seq, q.status, q.attempt_count, q.retry_after
),

-- Upstream's own table follows: readers of `runs` see a run that will never have a result.
outcome AS (
    UPDATE runs SET run_status = 'failed' FROM freed AS f
    WHERE runs.run_id = f.run_id AND f.status = 'FAILED'
),

ledger AS (
    UPDATE attempts AS a SET
        ended_at = clock_timestamp(),
        how = CASE WHEN f.status = 'CANCELLED' THEN 'cancelled' ELSE 'failed' END,
        failure_code = $5, detail = $6, started_at = h.started_at,
        last_heartbeat = h.last_heartbeat, progress = h.progress,
        outcome = jsonb_build_object(
            'status', f.status, 'attempt_count', f.attempt_count, 'retry_after', f.retry_after
        )
    FROM held AS h INNER JOIN freed AS f ON h.queue_id = f.queue_id
    WHERE a.run_id = h.run_id AND a.lease_seq = h.lease_seq
),

-- The runner is not given the run again for a while, as it asked ($8 seconds) or while others could
-- take it: others do not wait for its wish. What it failed and is over is forgotten on the way.
forgotten AS (
    DELETE FROM run_deferrals AS d USING held AS h
    WHERE
        d.runner_id = h.claimed_by AND d.run_id <> h.run_id
        AND (
            SELECT q.status FROM run_queue AS q -- a probe each, and no scan of the queue
            WHERE q.run_id = d.run_id AND q.job IS NOT NULL
        ) IN ('PENDING', 'CLAIMED', 'IN_PROGRESS') IS NOT TRUE
),

deferred AS (
    INSERT INTO run_deferrals AS d (run_id, runner_id, until, failed_at)
    SELECT
        h.run_id, h.claimed_by, clock_timestamp() + $8 * interval '1 second', clock_timestamp()
    FROM held AS h INNER JOIN freed AS f ON h.queue_id = f.queue_id
    WHERE f.status = 'PENDING'
    ON CONFLICT (run_id, runner_id) DO UPDATE SET
        until = excluded.until, failed_at = excluded.failed_at
),

audited AS (
    INSERT INTO audit (actor, action, target, run_id, runner_id, detail)
    SELECT
        'system', 'lease.cancel', 'run:' || h.run_id, h.run_id, $3,
        jsonb_build_object('lease_seq', h.lease_seq, 'reason', h.cancel_reason)
    FROM held AS h WHERE h.cancel_requested_at IS NOT NULL
)

SELECT queue_id, lease_seq, status, attempt_count, retry_after, pg_notify('bakeoff_queue', '')
FROM freed

-- name: overdue_share
-- How many leases are live, and how many of them are overdue: what the sweep's breaker looks at.
SELECT
    count(*) AS live,
    count(*) FILTER (WHERE lease_expires_at <= clock_timestamp()) AS overdue
FROM run_queue
WHERE status IN ('CLAIMED', 'IN_PROGRESS') AND lease_slot IS NOT NULL AND job IS NOT NULL

-- name: tally
-- The number of runs in each state, and the age in seconds of the oldest PENDING one that a live runner
-- could be given (0 in the other states). Each part has an index of its own rows, and the archived runs
-- are counted already: the cost is that of the queue, not of all runs that ever were.
WITH obtainable AS MATERIALIZED (
    SELECT w.model_id, w.judge_model_id
    FROM queue_heads() AS w
    INNER JOIN model_vram AS m ON w.model_id = m.model_id
    INNER JOIN model_vram AS j ON w.judge_model_id = j.model_id
    WHERE
        pause_of(w.model_id, w.judge_model_id) IS NULL
        AND EXISTS (
            SELECT FROM fleet AS f
            WHERE
                NOT (f.revoked OR f.dead OR f.paused OR f.draining)
                AND f.vram_gb >= greatest(m.need_gb, j.need_gb)
                AND f.quantizations @> ARRAY[m.quantization, j.quantization]
        )
)

SELECT
    q.status,
    count(*) AS runs,
    coalesce(extract(EPOCH FROM clock_timestamp() - min(q.created_at) FILTER (
        WHERE
            o.model_id IS NOT NULL
            AND (q.retry_after IS NULL OR q.retry_after <= clock_timestamp())
    )), 0)::float8 AS oldest_s
FROM run_queue AS q
LEFT JOIN obtainable AS o ON q.model_id = o.model_id AND q.judge_model_id = o.judge_model_id
WHERE q.status = 'PENDING' AND q.job IS NOT NULL
GROUP BY q.status
UNION ALL
SELECT status, count(*), 0
FROM run_queue
WHERE status IN ('CLAIMED', 'IN_PROGRESS') AND lease_slot IS NOT NULL AND job IS NOT NULL
GROUP BY status
UNION ALL
SELECT f.status, sum(f.runs)::bigint, 0
FROM (
    SELECT status, count(*) AS runs
    FROM run_queue
    WHERE status IN ('COMPLETE', 'FAILED', 'CANCELLED') AND job IS NOT NULL
    GROUP BY status
    UNION ALL
    SELECT status, runs FROM run_archive_changes
) AS f
GROUP BY f.status

-- name: lapse
-- End up to $1 leases whose deadline has passed: the sweep. Every process runs it; SKIP LOCKED
-- makes their batches disjoint, and the guard makes a second look harmless. The deadline is read
-- again under the row's lock, so a heartbeat that came first wins. lease_id and claimed_by stay:
-- until somebody else claims the run, a late result is still accepted.
WITH overdue AS MATERIALIZED (
    SELECT q.*, q.attempt_count + 1 AS failures FROM run_queue AS q
    WHERE
        q.status IN ('CLAIMED', 'IN_PROGRESS') AND q.job IS NOT NULL
        AND q.lease_slot IS NOT NULL -- of every lease that is live, and of the index
        AND q.lease_expires_at <= clock_timestamp()
    LIMIT $1
    FOR UPDATE SKIP LOCKED
),

-- How many different runners fell silent on the run, since an admin last put it back.
suspected AS (
    SELECT o.queue_id, count(DISTINCT s.runner_id) AS lost_runners
    FROM overdue AS o
    CROSS JOIN LATERAL (
        SELECT a.runner_id FROM attempts AS a
        WHERE
            a.run_id = o.run_id AND a.how = 'lapsed'
            AND a.claimed_at > coalesce(o.requeued_at, '-infinity')
        UNION ALL
        SELECT o.claimed_by
    ) AS s
    GROUP BY o.queue_id
),

ruled AS (
    SELECT
        o.*,
        s.lost_runners,
        CASE
            WHEN o.cancel_requested_at IS NOT NULL THEN 'CANCELLED'
            WHEN o.failures >= o.max_attempts OR s.lost_runners >= 3 THEN 'FAILED'
            ELSE 'PENDING'
        END AS next_status
    FROM overdue AS o INNER JOIN suspected AS s ON o.queue_id = s.queue_id
),

freed AS (
    UPDATE run_queue AS q SET
        status = r.next_status,
        attempt_count = CASE
            WHEN r.next_status = 'CANCELLED' THEN q.attempt_count ELSE r.failures
        END,
        completed_at = CASE WHEN r.next_status <> 'PENDING' THEN clock_timestamp() END,
        error_detail = CASE
            WHEN r.next_status <> 'FAILED' THEN NULL
            WHEN r.lost_runners >= 3 THEN 'poison_suspected: three runners fell silent on it'
            ELSE 'its last lease lapsed'
        END,
        lease_id = CASE WHEN r.next_status = 'CANCELLED' THEN NULL ELSE q.lease_id END,
        lease_expires_at = NULL, lease_slot = NULL, claim_key = NULL, claim_digest = NULL,
        updated_at = clock_timestamp()
    FROM ruled AS r
    WHERE q.queue_id = r.queue_id
    RETURNING
        q.queue_id, q.run_id, q.lease_seq, q.claimed_by, q.claimed_at, q.status,
        clock_timestamp() - r.lease_expires_at AS lag
),

outcome AS (
    UPDATE runs SET run_status = 'failed' FROM freed AS f
    WHERE runs.run_id = f.run_id AND f.status = 'FAILED'
),

ledger AS (
    UPDATE attempts AS a SET
        ended_at = clock_timestamp(),
        how = CASE WHEN f.status = 'CANCELLED' THEN 'cancelled' ELSE 'lapsed' END,
        started_at = o.started_at, last_heartbeat = o.last_heartbeat, progress = o.progress
    FROM overdue AS o INNER JOIN freed AS f ON o.queue_id = f.queue_id
    WHERE a.run_id = o.run_id AND a.lease_seq = o.lease_seq
),

-- The runners of what ends here, first of all: their ledgers are looked at, and nobody else's.
silent AS MATERIALIZED (
    SELECT u.runner_id, u.resumed_at FROM runners AS u
    WHERE u.runner_id IN (SELECT claimed_by FROM freed WHERE status <> 'CANCELLED')
),

-- A runner whose last three leases all lapsed, on three different runs, gets no more until an
-- admin resumes it: the fault is its own, and every run it takes waits a TTL for nothing. What ends
-- here counts as it will in the ledger, or which sweep ended a lease would decide.
paused AS (
    UPDATE runners AS u SET
        paused_at = clock_timestamp(), paused_until = NULL,
        pause_reason = 'three leases in a row lapsed'
    FROM silent AS s
    WHERE
        u.runner_id = s.runner_id AND u.resumed_at IS NOT DISTINCT FROM s.resumed_at
        AND NOT is_paused(u.paused_at, u.paused_until)
        AND 3 = (
            SELECT count(DISTINCT e.run_id) FILTER (WHERE e.how = 'lapsed')
            FROM (
                SELECT
                    f.run_id,
                    CASE WHEN f.status = 'CANCELLED' THEN 'cancelled' ELSE 'lapsed' END AS how,
                    f.claimed_at
                FROM freed AS f
                WHERE
                    f.claimed_by = s.runner_id
                    AND f.claimed_at > coalesce(s.resumed_at, '-infinity')
                UNION ALL
                SELECT a.run_id, a.how, a.claimed_at FROM attempts AS a
                WHERE
                    a.runner_id = s.runner_id AND a.ended_at IS NOT NULL
                    AND a.claimed_at > coalesce(s.resumed_at, '-infinity')
                ORDER BY claimed_at DESC LIMIT 3
            ) AS e
        )
    RETURNING u.runner_id
),

audited AS (
    INSERT INTO audit (actor, action, target, run_id, runner_id, detail)
    SELECT
        'system', 'lease.lapse', 'run:' || run_id, run_id, claimed_by,
        jsonb_build_object('lease_seq', lease_seq, 'status', status)
    FROM freed
    UNION ALL
    SELECT
        'system', 'runner.pause', 'runner:' || runner_id, NULL, runner_id,
        '{"reason": "three leases in a row lapsed"}'
    FROM paused
)

SELECT f.*, pg_notify('bakeoff_queue', '') FROM freed AS f

-- name: complete
-- Accept a result: the fence of a submit. PENDING counts while the lease_id is still there: the
-- lease lapsed, but nobody has claimed the run since, so the hours of work are kept.
UPDATE run_queue AS q SET
    status = 'COMPLETE', completed_at = clock_timestamp(), result_sha256 = $5,
    lease_expires_at = NULL, lease_slot = NULL, claim_key = NULL, claim_digest = NULL,
    lease_id = NULL, retry_after = NULL, error_detail = NULL, updated_at = clock_timestamp()
FROM runner_keys AS k
WHERE
    q.run_id = $1 AND q.job IS NOT NULL AND q.lease_id = $2 AND q.claimed_by = $3
    AND q.status IN ('CLAIMED', 'IN_PROGRESS', 'PENDING')
    AND k.fingerprint = $4 AND k.revoked_at IS NULL
    AND (k.not_after IS NULL OR k.not_after > clock_timestamp())
RETURNING q.queue_id, q.lease_seq, q.model_id, q.completed_at, q.started_at, q.last_heartbeat,
    q.progress

-- name: complete_attempt
-- Close the ledger's row of the lease that completed the run.
UPDATE attempts SET
    ended_at = $3, how = 'completed', started_at = $4, last_heartbeat = $5, progress = $6
WHERE run_id = $1 AND lease_seq = $2

-- name: find
-- One run of ours, archived or not, with its model, as a GET shows it: all but its job, which may
-- have megabytes.
SELECT
    q.run_id, q.queue_id, q.status, q.priority, q.attempt_count, q.max_attempts, q.claimed_by,
    q.claimed_at, q.started_at, q.completed_at, q.created_at, q.retry_after, q.error_detail,
    q.batch_id, q.progress, q.cancel_requested_at, q.cancel_reason, q.lease_seq, q.lease_id,
    q.lease_expires_at, q.last_heartbeat, q.result_sha256, q.config_hash, q.max_runtime_s,
    m.name AS model_name, m.quantization,
    CASE WHEN j.model_id <> m.model_id THEN j.name END AS judge_model,
    greatest(m.need_gb, j.need_gb) AS need_gb
FROM every_run AS q
LEFT JOIN model_vram AS m ON q.model_id = m.model_id
LEFT JOIN model_vram AS j ON q.judge_model_id = j.model_id
WHERE q.run_id = $1 AND q.job IS NOT NULL

-- name: job_of
-- The job of a run stays text: nobody in the server reads it.
SELECT job::text AS job FROM every_run WHERE run_id = $1 AND job IS NOT NULL

-- name: find_for_key
-- A run, archived or not, and whether this key is good and who may sign for it: what a submit needs
-- to know before its body is read. Without the job: it may have megabytes, and many runners ask.
SELECT
    q.run_id, q.status, q.claimed_by, q.lease_id,
    (
        k.revoked_at IS NULL AND (k.not_after IS NULL OR k.not_after > clock_timestamp())
    ) AS key_good,
    k.signature_policy, k.public_key, k.signer_identity, k.signer_issuer
FROM every_run AS q
LEFT JOIN runner_keys AS k ON k.fingerprint = $2
WHERE q.run_id = $1 AND q.job IS NOT NULL

-- name: explain
-- Everything that decides whether a run ($1) can be handed out now, in one row. A runner is stale when
-- it was silent for $2; it has $3 leases where its key says nothing else. The runs ahead are those that
-- are not paused and that one of the capable runners could take, counted up to $4 for each model.
WITH run AS MATERIALIZED (
    SELECT
        q.run_id, q.queue_id, q.status, q.priority, q.created_at, q.retry_after, q.attempt_count,
        q.max_attempts, q.claimed_by, q.claimed_at, q.lease_expires_at, q.completed_at,
        q.error_detail, q.cancel_reason, m.name AS model_name, m.quantization,
        CASE WHEN j.model_id <> m.model_id THEN j.name END AS judge_model,
        j.quantization AS judge_quantization, greatest(m.need_gb, j.need_gb) AS need_gb,
        pause_of(q.model_id, q.judge_model_id) AS pause_reason
    FROM every_run AS q
    INNER JOIN model_vram AS m ON q.model_id = m.model_id
    INNER JOIN model_vram AS j ON q.judge_model_id = j.model_id
    WHERE q.run_id = $1 AND q.job IS NOT NULL
),

machines AS MATERIALIZED (
    SELECT
        f.*, run.need_gb <= f.vram_gb AS large_enough,
        f.quantizations @> ARRAY[run.quantization, run.judge_quantization] AS supports,
        f.dead OR f.last_heartbeat < clock_timestamp() - $2::interval AS stale,
        (
            SELECT count(*) FROM run_queue AS h
            WHERE h.claimed_by = f.runner_id AND h.lease_slot IS NOT NULL
        ) >= coalesce(f.max_leases, $3) AS busy,
        EXISTS (
            SELECT FROM run_deferrals AS d
            WHERE
                d.run_id = run.run_id AND d.runner_id = f.runner_id
                AND (d.until > clock_timestamp() OR another_fits(d.run_id, d.runner_id))
        ) AS deferred
    FROM fleet AS f CROSS JOIN run
    WHERE NOT f.revoked AND run.status = 'PENDING'
),

capable AS (
    SELECT * FROM machines WHERE large_enough AND supports
),

ahead AS (
    SELECT coalesce(sum(n.runs), 0)::bigint AS runs, coalesce(bool_or(n.runs >= $4), false) AS more
    FROM run
    CROSS JOIN queue_heads() AS w
    INNER JOIN model_vram AS m ON w.model_id = m.model_id
    INNER JOIN model_vram AS j ON w.judge_model_id = j.model_id
    CROSS JOIN LATERAL (
        SELECT count(*) AS runs FROM (
            SELECT FROM run_queue AS q
            WHERE
                q.model_id = w.model_id AND q.judge_model_id = w.judge_model_id
                AND q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NULL
                AND (q.priority, q.created_at, q.queue_id)
                < (run.priority, run.created_at, run.queue_id)
            LIMIT $4
        ) AS before
    ) AS n
    WHERE
        run.status = 'PENDING' AND pause_of(w.model_id, w.judge_model_id) IS NULL
        AND EXISTS (
            SELECT FROM capable AS c
            WHERE
                NOT c.stale AND c.vram_gb >= greatest(m.need_gb, j.need_gb)
                AND c.quantizations @> ARRAY[m.quantization, j.quantization]
        )
)

SELECT
    run.*, statement_timestamp() AS now, ahead.runs AS ahead, ahead.more AS ahead_more, c.*,
    (
        SELECT count(*) FROM capable AS c
        CROSS JOIN LATERAL (
            SELECT FROM attempts AS a
            WHERE a.runner_id = c.runner_id AND a.claimed_at > clock_timestamp() - interval '1 hour'
            LIMIT 1000
        ) AS a
        WHERE NOT c.stale
    ) AS claimed_last_hour
FROM run
CROSS JOIN ahead
CROSS JOIN LATERAL (
    SELECT
        count(*) AS runners,
        count(*) FILTER (WHERE NOT stale) AS live,
        max(vram_gb) FILTER (WHERE NOT stale) AS largest_live_gb,
        max(vram_gb) AS largest_gb,
        count(*) FILTER (WHERE supports AND NOT stale) AS supporting_live,
        count(*) FILTER (WHERE supports) AS supporting,
        count(*) FILTER (WHERE large_enough AND supports) AS capable,
        count(*) FILTER (WHERE large_enough AND supports AND stale) AS stale,
        count(*) FILTER (WHERE large_enough AND supports AND NOT stale AND paused) AS paused,
        count(*) FILTER (
            WHERE large_enough AND supports AND NOT stale AND NOT paused AND draining
        ) AS draining,
        count(*) FILTER (
            WHERE large_enough AND supports AND NOT (stale OR paused OR draining) AND busy
        ) AS busy,
        count(*) FILTER (
            WHERE
                large_enough AND supports AND NOT (stale OR paused OR draining OR busy) AND deferred
        ) AS deferred,
        count(*) FILTER (
            WHERE large_enough AND supports AND NOT (stale OR paused OR draining OR busy OR deferred)
        ) AS free
    FROM machines
) AS c

-- name: backlog
-- The PENDING runs by model and judge, as `offers` counts them (up to $1), beside what the live fleet
-- (not silent for $2) could take of them.
WITH live AS MATERIALIZED (
    SELECT f.vram_gb, f.quantizations FROM fleet AS f
    WHERE
        NOT (f.revoked OR f.dead OR f.paused OR f.draining)
        AND f.last_heartbeat > clock_timestamp() - $2::interval
)

SELECT
    pause_of(w.model_id, w.judge_model_id) IS NOT NULL AS paused,
    EXISTS (SELECT FROM live) AS anybody,
    EXISTS (
        SELECT FROM live AS f WHERE f.vram_gb >= greatest(m.need_gb, j.need_gb)
    ) AS large_enough,
    EXISTS (
        SELECT FROM live AS f WHERE f.quantizations @> ARRAY[m.quantization, j.quantization]
    ) AS supported,
    EXISTS (
        SELECT FROM live AS f
        WHERE
            f.vram_gb >= greatest(m.need_gb, j.need_gb)
            AND f.quantizations @> ARRAY[m.quantization, j.quantization]
    ) AS fits,
    (
        SELECT count(*) FROM (
            SELECT FROM run_queue AS q
            WHERE
                q.model_id = w.model_id AND q.judge_model_id = w.judge_model_id
                AND q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NULL
            LIMIT $1
        ) AS ready
    ) AS ready,
    (
        SELECT count(*) FROM (
            SELECT FROM run_queue AS q
            WHERE
                q.model_id = w.model_id AND q.judge_model_id = w.judge_model_id
                AND q.status = 'PENDING' AND q.job IS NOT NULL
                AND q.retry_after > statement_timestamp()
            LIMIT $1
        ) AS later
    ) AS later
FROM queue_heads() AS w
INNER JOIN model_vram AS m ON w.model_id = m.model_id
INNER JOIN model_vram AS j ON w.judge_model_id = j.model_id

-- name: pause
-- Pause the queue ($1 is 'queue') or a model; a pause that is there gets the new reason and end.
INSERT INTO queue_pauses AS p (scope, model_id, reason, paused_at, until, paused_by)
VALUES ($1, $2, $3, clock_timestamp(), $4, $5)
ON CONFLICT (scope) DO UPDATE SET
    reason = excluded.reason, until = excluded.until, paused_by = excluded.paused_by,
    paused_at = CASE
        WHEN is_paused(p.paused_at, p.until) THEN p.paused_at ELSE excluded.paused_at
    END
RETURNING scope, model_id, reason, paused_at, until, paused_by

-- name: resume
-- End a pause, and wake the claims that wait. A pause that has ended by itself is none.
WITH ended AS (
    DELETE FROM queue_pauses WHERE scope = $1
    RETURNING is_paused(paused_at, until) AS was_paused
)

SELECT was_paused, pg_notify('bakeoff_queue', '') FROM ended

-- name: pauses
SELECT p.scope, p.model_id, m.name AS model, p.reason, p.paused_at, p.until, p.paused_by
FROM queue_pauses AS p
LEFT JOIN models AS m ON p.model_id = m.model_id
WHERE is_paused(p.paused_at, p.until)
ORDER BY p.paused_at

-- name: set
-- Change the priority ($2) or the earliest start of a PENDING run; null leaves the priority, and $3
-- says whether $4 is set. Waiting claims are woken by `announce`.
UPDATE run_queue SET
    priority = coalesce($2, priority),
    retry_after = CASE WHEN $3::boolean THEN $4 ELSE retry_after END,
    updated_at = clock_timestamp()
WHERE run_id = $1 AND job IS NOT NULL AND status = 'PENDING'
RETURNING run_id, status, priority, retry_after

-- name: why_refused
-- What leases that a guard refused have to do with their runs ($1, archived or not) and keys ($2): a
-- row each, in order, in one statement. Only what tells the refusals apart: one request may ask for
-- 64 runs whose jobs have megabytes.
SELECT
    q.status,
    q.status IN ('CLAIMED', 'IN_PROGRESS')
    AND q.lease_id = g.lease_id AND q.claimed_by = g.runner_id AS other_process,
    EXISTS (
        SELECT FROM runner_keys AS k
        WHERE
            k.fingerprint = g.fingerprint AND k.revoked_at IS NULL
            AND (k.not_after IS NULL OR k.not_after > clock_timestamp())
    ) AS key_good
FROM unnest($1::uuid [], $2::text [], $3::uuid [], $4::text [])
    WITH ORDINALITY AS g (run_id, fingerprint, lease_id, runner_id, place)
LEFT JOIN LATERAL (
    SELECT e.status, e.lease_id, e.claimed_by FROM every_run AS e
    WHERE e.run_id = g.run_id AND e.job IS NOT NULL
    OFFSET 0 -- a probe each, and never a pass over the queue
) AS q ON true
ORDER BY g.place

-- name: enqueue
-- Add runs whose row in `runs` this transaction has just made, so none of them is queued already.
-- Those of one request are a microsecond apart, so that runs of one priority are handed out in the
-- order they were given; $11 of them have been added by statements before this one.
INSERT INTO run_queue (
    queue_id, run_id, model_id, judge_model_id, job, config_hash, priority, retry_after,
    max_attempts, max_runtime_s, batch_id, created_at
)
SELECT
    gen_random_uuid(), t.run_id, t.model_id, t.judge_model_id, t.job::jsonb, t.config_hash,
    t.priority, t.not_before, t.max_attempts, t.max_runtime_s, t.batch_id,
    now() + ($11::int + t.place) * interval '1 microsecond'
FROM unnest(
    $1::uuid [], $2::uuid [], $3::uuid [], $4::text [], $5::text [], $6::int [],
    $7::timestamptz [], $8::int [], $9::int [], $10::uuid []
) WITH ORDINALITY AS t (
    run_id, model_id, judge_model_id, job, config_hash, priority, not_before, max_attempts,
    max_runtime_s, batch_id, place
)

-- name: same_config
-- The newest earlier run of each of these configs ($1), and its batch, but for the runs ($2) that
-- are being added now.
SELECT h.config_hash, q.run_id, q.batch_id, q.created_at
FROM unnest($1::text []) AS h (config_hash)
CROSS JOIN LATERAL (
    SELECT e.run_id, e.batch_id, e.created_at FROM every_run AS e
    WHERE
        e.config_hash = h.config_hash AND e.job IS NOT NULL AND e.run_id <> all($2::uuid [])
    ORDER BY e.created_at DESC LIMIT 1
) AS q

-- name: enqueued
-- What is queued, or was and is archived, under these run_ids.
SELECT queue_id, run_id, status FROM every_run
WHERE run_id = any($1::uuid []) AND job IS NOT NULL

-- name: compared
-- What of the runs that are sent again differs from those that are there: members of the job, model
-- and judge. Compared here: the jobs may have megabytes.
SELECT
    q.run_id,
    ARRAY(
        SELECT name FROM (
            SELECT 'model' AS name WHERE q.model_id <> t.model_id
            UNION ALL
            SELECT 'judge' WHERE q.judge_model_id <> t.judge_model_id
            UNION ALL
            SELECT coalesce(a.key, b.key)
            FROM jsonb_each(q.job) AS a FULL JOIN jsonb_each(t.job::jsonb) AS b ON a.key = b.key
            WHERE
                a.value IS DISTINCT FROM b.value
                AND coalesce(a.key, b.key) <> 'config_hash' -- made of the config
        ) AS each
        ORDER BY name
    ) AS differs
FROM
    unnest($1::uuid [], $2::uuid [], $3::uuid [], $4::text [])
    AS t (run_id, model_id, judge_model_id, job)
INNER JOIN every_run AS q ON t.run_id = q.run_id
WHERE q.run_id = any($1::uuid []) AND q.job IS NOT NULL

-- name: announce
-- Wake the claims that wait, in every process, when this transaction commits.
SELECT pg_notify('bakeoff_queue', '')

-- name: list_page
-- One page of the admin's list after the cursor ($2, $3), oldest first; archived runs have their place
-- in it. The cursor is one comparison, without an OR: each table's index begins there. `$5` and later
-- are filters, null for none: model name or id, runner (of a lease or attempt), batch, the earliest and
-- the latest time of creation, a text in the model's name or the error, the first digits of the run_id
-- as a range.
SELECT
    q.run_id, q.queue_id, q.status, q.priority, q.attempt_count, q.max_attempts, q.claimed_by,
    q.claimed_at, q.created_at, q.completed_at, q.retry_after, q.error_detail, q.batch_id,
    q.progress, q.cancel_requested_at, q.lease_seq, q.lease_expires_at,
    m.name AS model_name, m.quantization,
    greatest(m.need_gb, j.need_gb) AS need_gb
FROM every_run AS q
INNER JOIN model_vram AS m ON q.model_id = m.model_id
INNER JOIN model_vram AS j ON q.judge_model_id = j.model_id
WHERE
    q.job IS NOT NULL
    AND ($1::text IS NULL OR q.status = $1)
    AND (q.created_at, q.run_id) > ($2::timestamptz, $3::uuid)
    AND ($5::text IS NULL OR m.name = $5 OR m.model_id::text = $5)
    AND (
        $6::text IS NULL OR q.claimed_by = $6
        OR EXISTS (SELECT FROM attempts AS a WHERE a.run_id = q.run_id AND a.runner_id = $6)
    )
    AND ($7::uuid IS NULL OR q.batch_id = $7)
    AND ($8::timestamptz IS NULL OR q.created_at >= $8)
    AND ($9::timestamptz IS NULL OR q.created_at < $9)
    AND (
        $10::text IS NULL OR position(lower($10) IN lower(m.name)) > 0
        OR position(lower($10) IN lower(coalesce(q.error_detail, ''))) > 0
    )
    AND ($11::uuid IS NULL OR q.run_id BETWEEN $11 AND $12)
ORDER BY q.created_at, q.run_id
LIMIT $4

-- name: cancel_pending
-- Cancel a run that nobody works on: done at once.
UPDATE run_queue SET
    status = 'CANCELLED', cancel_requested_at = clock_timestamp(), cancel_reason = $2,
    completed_at = clock_timestamp(), lease_id = NULL, updated_at = clock_timestamp()
WHERE run_id = $1 AND job IS NOT NULL AND status = 'PENDING'
RETURNING status

-- name: cancel_live
-- Ask the runner that works on the run to stop: its next heartbeat says so. Nothing that keeps the
-- lease alive is touched, so a silent runner's cancel completes when its lease lapses.
UPDATE run_queue SET
    cancel_requested_at = coalesce(cancel_requested_at, clock_timestamp()),
    cancel_reason = coalesce(cancel_reason, $2)
WHERE run_id = $1 AND job IS NOT NULL AND status IN ('CLAIMED', 'IN_PROGRESS')
RETURNING status

-- name: requeue
-- Put a run that ended without a result back, as if it had never been tried; the ledger remembers.
WITH put_back AS (
    UPDATE run_queue SET
        status = 'PENDING', attempt_count = 0, retry_after = NULL, completed_at = NULL,
        error_detail = NULL, cancel_requested_at = NULL, cancel_reason = NULL, lease_id = NULL,
        claimed_by = NULL, claimed_at = NULL, started_at = NULL,
        requeued_at = clock_timestamp(), updated_at = clock_timestamp()
    WHERE
        run_id = $1 AND job IS NOT NULL
        -- one that waits as well, when it shall not wait for its failures any more
        AND (status IN ('FAILED', 'CANCELLED') OR status = 'PENDING' AND $2::boolean)
    RETURNING run_id, status
),

outcome AS (
    UPDATE runs SET run_status = 'incomplete' FROM put_back AS p WHERE runs.run_id = p.run_id
),

forgotten AS (
    DELETE FROM run_deferrals AS d USING put_back AS p WHERE d.run_id = p.run_id
)

SELECT status, pg_notify('bakeoff_queue', '') FROM put_back

-- name: again
-- Add a run with the job of a COMPLETE one ($1), archived or not, whose result is not complete. A run
-- of its own: what was accepted, its rows and its bytes stay as they are.
WITH source AS (
    SELECT q.* FROM every_run AS q
    INNER JOIN runs AS r ON q.run_id = r.run_id
    WHERE
        q.run_id = $1 AND q.job IS NOT NULL AND q.status = 'COMPLETE'
        AND r.run_status IN ('incomplete', 'failed')
),

named AS (
    INSERT INTO runs (run_id, submitted_at, publisher_id, run_status)
    SELECT gen_random_uuid(), now(), 'bakeoff-queue', 'incomplete' FROM source
    RETURNING run_id
)

INSERT INTO run_queue (
    queue_id, run_id, model_id, judge_model_id, job, config_hash, priority, max_attempts,
    max_runtime_s, batch_id
)
SELECT
    gen_random_uuid(), n.run_id, s.model_id, s.judge_model_id,
    jsonb_set(s.job, '{config,run,name}', to_jsonb(n.run_id::text)), -- as every enqueue names it
    s.config_hash, s.priority, s.max_attempts, s.max_runtime_s, s.batch_id
FROM source AS s CROSS JOIN named AS n
RETURNING run_id, pg_notify('bakeoff_queue', '')

-- name: failed_by
-- The runs that wait, or have ended without a result, since a runner ($1) failed them or fell silent on
-- them within $2: at most $3, those that failed first.
SELECT q.run_id
FROM (
    SELECT run_id, max(ended_at) AS ended_at FROM attempts
    WHERE runner_id = $1 AND how IN ('failed', 'lapsed') AND ended_at > clock_timestamp() - $2::interval
    GROUP BY run_id
) AS a
CROSS JOIN LATERAL (
    SELECT * FROM run_queue WHERE run_id = a.run_id AND job IS NOT NULL
    OFFSET 0 -- a probe each, and no scan of the queue
) AS q
WHERE
    (q.status = 'FAILED' OR q.status = 'PENDING' AND q.attempt_count > 0)
    AND a.ended_at > coalesce(q.requeued_at, '-infinity')
ORDER BY a.ended_at
LIMIT $3

-- name: end_leases_of_key
-- End every lease of a key that was just revoked in this transaction ($6 = 'revoked'), and forget the
-- secrets of its lapsed ones, so that nothing of this key can be submitted any more. Or hand back
-- what a process of its runner ($8) holds, which signs off ('released'): no attempt is burnt, and the released leases before the newest $7 of a run are forgotten, as by `release`.
WITH held AS MATERIALIZED (
    SELECT * FROM run_queue
    WHERE
        lease_key = $1 AND lease_id IS NOT NULL AND ($6 = 'revoked' OR lease_instance = $8)
        AND (status IN ('CLAIMED', 'IN_PROGRESS') OR status = 'PENDING' AND $6::text = 'revoked')
    ORDER BY queue_id FOR UPDATE
),

freed AS (
    UPDATE run_queue AS q SET
        status = CASE WHEN h.cancel_requested_at IS NULL THEN 'PENDING' ELSE 'CANCELLED' END,
        completed_at = CASE WHEN h.cancel_requested_at IS NOT NULL THEN clock_timestamp() END,
        lease_id = NULL, lease_key = NULL, lease_expires_at = NULL, lease_slot = NULL,
        claim_key = NULL, claim_digest = NULL, claimed_by = NULL, claimed_at = NULL,
        started_at = NULL, updated_at = clock_timestamp()
    FROM held AS h
    WHERE q.queue_id = h.queue_id
    RETURNING q.queue_id, q.status
),

ledger AS (
    UPDATE attempts AS a SET
        ended_at = clock_timestamp(),
        how = CASE
            WHEN $6 = 'released' AND h.cancel_requested_at IS NOT NULL THEN 'cancelled' ELSE $6
        END,
        detail = $2, started_at = h.started_at, last_heartbeat = h.last_heartbeat,
        progress = h.progress, outcome = jsonb_build_object('status', f.status)
    FROM held AS h INNER JOIN freed AS f ON h.queue_id = f.queue_id
    WHERE a.run_id = h.run_id AND a.lease_seq = h.lease_seq AND a.ended_at IS NULL
),

audited AS (
    INSERT INTO audit (actor, action, target, address, token_id, run_id, runner_id, detail)
    SELECT
        $3, 'lease.revoke', 'run:' || h.run_id, $4, $5, h.run_id, h.claimed_by,
        jsonb_build_object('lease_seq', h.lease_seq, 'reason', $2::text)
    FROM held AS h WHERE h.status IN ('CLAIMED', 'IN_PROGRESS') AND $6 = 'revoked'
),

forgotten AS (
    DELETE FROM attempts AS a USING held AS h
    WHERE a.run_id = h.run_id AND a.lease_seq <= h.lease_seq - $7::int AND a.how = 'released'
)

SELECT run_id, queue_id, lease_seq, pg_notify('bakeoff_queue', '')
FROM held WHERE status IN ('CLAIMED', 'IN_PROGRESS')
ORDER BY claimed_at
