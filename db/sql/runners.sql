-- name: upsert
-- A runner signs on: one row per runner_id, as upstream has it.
INSERT INTO runners AS r (
    runner_id, public_key, hostname, process_id, effective_user, instance_id, capabilities,
    version, key_fingerprint, address, registered_at, started_at, last_heartbeat, status
) VALUES (
    $1, $2, $3, $4, $5, $6, $7, $8, $9, $10,
    clock_timestamp(), clock_timestamp(), clock_timestamp(), 'IDLE'
)
ON CONFLICT (runner_id) DO UPDATE SET
    public_key = excluded.public_key, hostname = excluded.hostname,
    process_id = excluded.process_id, effective_user = excluded.effective_user,
    instance_id = excluded.instance_id, capabilities = excluded.capabilities,
    previous_instance_id = CASE WHEN r.instance_id IS DISTINCT FROM excluded.instance_id
        THEN r.instance_id ELSE r.previous_instance_id
    END,
    previous_started_at = CASE WHEN r.instance_id IS DISTINCT FROM excluded.instance_id
        THEN r.started_at ELSE r.previous_started_at
    END,
    version = excluded.version, key_fingerprint = excluded.key_fingerprint,
    address = excluded.address,
    -- A new process starts anew; one that renews its token in mid-run does not, nor does the one
    -- before it, which registers again while both of them live.
    started_at = CASE
        WHEN r.instance_id = excluded.instance_id THEN r.started_at
        WHEN r.previous_instance_id = excluded.instance_id THEN r.previous_started_at
        ELSE excluded.started_at
    END,
    registered_at = coalesce(r.registered_at, excluded.registered_at),
    last_heartbeat = excluded.last_heartbeat,
    status = CASE WHEN r.status = 'ACTIVE' THEN r.status ELSE excluded.status END
RETURNING runner_id, (xmax = 0) AS created

-- name: find
SELECT * FROM runners WHERE runner_id = $1

-- name: standings
-- Runners that have registered, by their keys ($1), beside what the allowlist says of each key.
SELECT
    k.fingerprint, r.capabilities, is_paused(r.paused_at, r.paused_until) AS paused, r.pause_reason,
    k.capability_caps, k.max_leases
FROM runner_keys AS k
INNER JOIN runners AS r ON k.runner_id = r.runner_id
WHERE k.fingerprint = any($1::text []) AND r.capabilities IS NOT NULL

-- name: is_draining
SELECT drain_requested_at IS NOT NULL FROM runners WHERE runner_id = $1

-- name: sign_off
-- No process of the runner is left, and the newest ($2) said so: one that fell silent keeps its
-- instance_id.
UPDATE runners SET status = 'DEAD', instance_id = NULL WHERE runner_id = $1 AND instance_id = $2

-- name: remember_nonce
-- Nothing is returned when this key has used the nonce before. Nonces whose signature would be
-- refused by its age are forgotten on the way, and all but the newest $9 of a key that registers
-- without end: one of those, sent again, is answered with a token of its own.
WITH forgotten AS (
    DELETE FROM registration_nonces
    WHERE
        fingerprint = $1 AND nonce <> $2
        AND keep_until < greatest(statement_timestamp(), (
            SELECT n.keep_until FROM registration_nonces AS n
            WHERE n.fingerprint = $1
            ORDER BY n.keep_until DESC OFFSET $9::int - 1 LIMIT 1
        ))
)

INSERT INTO registration_nonces (
    fingerprint, nonce, request_sha256, jti, issued_at, keep_until, created, address
) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
ON CONFLICT DO NOTHING
RETURNING nonce

-- name: find_nonce
SELECT * FROM registration_nonces WHERE fingerprint = $1 AND nonce = $2

-- name: living_tokens
-- The tokens that a runner ($1) was given within the life of one ($2): a registration is kept for at
-- least as long.
SELECT
    n.jti, n.fingerprint AS key_fingerprint, n.issued_at, n.issued_at + $2::interval AS expires_at,
    n.address, t.jti IS NOT NULL OR k.revoked_at IS NOT NULL AS revoked
FROM runner_keys AS k
INNER JOIN registration_nonces AS n ON k.fingerprint = n.fingerprint
LEFT JOIN revoked_tokens AS t ON n.jti = t.jti
WHERE k.runner_id = $1 AND n.issued_at > clock_timestamp() - $2::interval
ORDER BY n.issued_at DESC, n.jti

-- name: seen
-- Runners that were heard of since the last batch: busy ones are ACTIVE, others IDLE. Of each process
-- ($2) that was heard, so many seconds ago ($3): one that is not the newest, and was heard after that
-- one had registered (with 5 s for a slow way here), is a second process of the same key.
WITH heard AS (
    SELECT
        h.runner_id,
        bool_or(
            h.instance_id <> r.instance_id
            AND clock_timestamp() - (h.age_s + 5) * interval '1 second' > r.started_at
        ) AS second
    FROM unnest($1::text [], $2::uuid [], $3::float8 []) AS h (runner_id, instance_id, age_s)
    INNER JOIN runners AS r ON h.runner_id = r.runner_id
    GROUP BY h.runner_id
)

UPDATE runners AS r SET
    last_heartbeat = clock_timestamp(),
    second_process_seen_at = CASE
        WHEN h.second THEN clock_timestamp() ELSE r.second_process_seen_at
    END,
    status = CASE
        WHEN EXISTS (
            SELECT FROM run_queue AS q
            WHERE q.claimed_by = r.runner_id AND q.lease_slot IS NOT NULL
        ) THEN 'ACTIVE'
        ELSE 'IDLE'
    END
FROM heard AS h
WHERE r.runner_id = h.runner_id
RETURNING
    r.runner_id,
    h.second AND NOT EXISTS ( -- as it was before this statement
        SELECT FROM runners AS o
        WHERE
            o.runner_id = r.runner_id
            AND o.second_process_seen_at > clock_timestamp() - interval '1 hour'
    ) AS second_process

-- name: mark_dead
-- Runners of ours that nobody has heard of for $1 are DEAD; bakeoff's own rows are bakeoff's.
UPDATE runners SET status = 'DEAD'
WHERE
    status IN ('ACTIVE', 'IDLE') AND key_fingerprint IS NOT NULL
    AND last_heartbeat < clock_timestamp() - $1::interval
RETURNING runner_id

-- name: overview
-- Up to $3 runners that have registered here, by name, after the cursor ($2), or the one called $1:
-- each with its key, what it holds and how long it was silent. The page is cut first, in the order of
-- the primary key: who has registered has a key (a foreign key), and bakeoff's own runners have none.
-- The LIMIT of one key keeps the planner from reading all keys to join them.
SELECT
    r.runner_id, r.hostname, r.version, r.status, r.capabilities, r.registered_at, r.started_at,
    r.last_heartbeat, clock_timestamp() - r.last_heartbeat AS silent_for,
    r.status = 'DEAD' AND r.instance_id IS NULL AS signed_off,
    is_paused(r.paused_at, r.paused_until) AS paused, r.paused_at, r.paused_until, r.pause_reason,
    r.drain_requested_at, r.second_process_seen_at, k.fingerprint AS key_fingerprint,
    k.revoked_at, k.capability_caps, k.max_leases,
    (
        SELECT coalesce(array_agg(q.run_id ORDER BY q.claimed_at), '{}')
        FROM run_queue AS q
        WHERE q.claimed_by = r.runner_id AND q.lease_slot IS NOT NULL
    ) AS current_runs
FROM (
    SELECT * FROM runners
    WHERE
        key_fingerprint IS NOT NULL AND runner_id > $2
        AND ($1::text IS NULL OR runner_id = $1)
    ORDER BY runner_id
    LIMIT $3
) AS r
CROSS JOIN LATERAL (
    SELECT fingerprint, revoked_at, capability_caps, max_leases FROM runner_keys
    WHERE fingerprint = r.key_fingerprint
    LIMIT 1
) AS k
ORDER BY r.runner_id

-- name: by_state
-- The number of runners in each state; one is stale when it was silent for $1.
SELECT
    CASE
        WHEN f.revoked THEN 'revoked'
        WHEN f.paused THEN 'paused'
        WHEN f.dead OR f.last_heartbeat < clock_timestamp() - $1::interval THEN 'stale'
        WHEN f.draining THEN 'draining'
        WHEN EXISTS (
            SELECT FROM run_queue AS q
            WHERE q.claimed_by = f.runner_id AND q.lease_slot IS NOT NULL
        ) THEN 'busy'
        ELSE 'idle'
    END AS state,
    count(*) AS runners
FROM fleet AS f
GROUP BY state

-- name: pause
-- No new leases until $3, or until an admin resumes the runner; what it holds it may finish.
UPDATE runners SET paused_at = clock_timestamp(), paused_until = $3, pause_reason = $2
WHERE runner_id = $1 AND key_fingerprint IS NOT NULL
RETURNING runner_id

-- name: resume
-- Undo a pause or a drain, and wake the runner's parked claims.
UPDATE runners SET
    paused_at = NULL, paused_until = NULL, pause_reason = NULL, drain_requested_at = NULL,
    resumed_at = clock_timestamp()
WHERE runner_id = $1 AND key_fingerprint IS NOT NULL
RETURNING runner_id, pg_notify('bakeoff_queue', '')

-- name: drain
-- The next heartbeat tells the runner to finish what it holds; it is given nothing new.
UPDATE runners SET drain_requested_at = coalesce(drain_requested_at, clock_timestamp())
WHERE runner_id = $1 AND key_fingerprint IS NOT NULL
RETURNING runner_id

-- name: pause_failing
-- Pause a runner ($1) for $2 seconds when, since an admin last resumed it, its last three leases failed
-- on three different runs, or brought results without any measurement, or it handed its last ten back,
-- or ten of its bundles were refused since its last accepted one: the fault is its own, and every run it takes waits or loses an attempt. The pause
-- ends by itself; what came before it still counts, so the next failure pauses the runner again.
WITH last_leases AS (
    SELECT
        a.run_id, a.how, a.failure_code, a.ended_at,
        a.how = 'completed' AND EXISTS (
            SELECT FROM submissions AS s
            WHERE s.run_id = a.run_id AND s.lease_seq = a.lease_seq AND s.model_metrics = 0
        ) AS empty,
        row_number() OVER (ORDER BY a.claimed_at DESC) AS age
    FROM runners AS r
    CROSS JOIN LATERAL (
        SELECT run_id, lease_seq, how, failure_code, claimed_at, ended_at FROM attempts
        WHERE
            runner_id = r.runner_id AND ended_at IS NOT NULL
            AND claimed_at > coalesce(r.resumed_at, '-infinity')
        ORDER BY claimed_at DESC LIMIT 10
    ) AS a
    WHERE r.runner_id = $1
),

found AS (
    SELECT
        CASE
            WHEN (
                SELECT count(DISTINCT run_id) FROM last_leases WHERE age <= 3 AND how = 'failed'
            ) = 3
                THEN 'three leases in a row failed, the last one with '
                    || (SELECT failure_code FROM last_leases WHERE age = 1)
            WHEN (SELECT count(DISTINCT run_id) FROM last_leases WHERE age <= 3 AND empty) = 3
                THEN 'three results in a row had no measurement'
            WHEN (SELECT count(*) FROM last_leases WHERE how = 'released') = 10
                THEN 'ten leases in a row were handed back'
            WHEN (
                SELECT count(*) FROM (
                    SELECT FROM submission_refusals AS s
                    INNER JOIN runners AS r ON s.runner_id = r.runner_id
                    WHERE
                        s.runner_id = $1
                        AND s.refused_at > coalesce(r.resumed_at, '-infinity')
                        AND s.refused_at > coalesce(
                            (SELECT max(ended_at) FROM last_leases WHERE how = 'completed'),
                            '-infinity'
                        )
                    LIMIT 10
                ) AS refused
            ) = 10
                THEN 'ten bundles in a row were refused'
        END AS reason
),

paused AS (
    UPDATE runners AS u SET
        paused_at = clock_timestamp(),
        paused_until = clock_timestamp() + $2 * interval '1 second',
        pause_reason = f.reason
    FROM found AS f
    WHERE
        u.runner_id = $1 AND f.reason IS NOT NULL AND NOT is_paused(u.paused_at, u.paused_until)
    RETURNING u.runner_id, u.pause_reason, u.paused_until
),

audited AS (
    INSERT INTO audit (actor, action, target, runner_id, detail)
    SELECT
        'system', 'runner.pause', 'runner:' || runner_id, runner_id,
        jsonb_build_object('reason', pause_reason, 'until', paused_until)
    FROM paused
)

SELECT pause_reason FROM paused
