-- name: upsert
-- A runner signs on: one row per runner_id, as upstream has it.
INSERT INTO runners AS r (
    runner_id, public_key, hostname, process_id, effective_user, instance_id, capabilities,
    version, key_fingerprint, registered_at, started_at, last_heartbeat, status
) VALUES (
    $1, $2, $3, $4, $5, $6, $7, $8, $9,
    clock_timestamp(), clock_timestamp(), clock_timestamp(), 'IDLE'
)
ON CONFLICT (runner_id) DO UPDATE SET
    public_key = excluded.public_key, hostname = excluded.hostname,
    process_id = excluded.process_id, effective_user = excluded.effective_user,
    instance_id = excluded.instance_id, capabilities = excluded.capabilities,
    version = excluded.version, key_fingerprint = excluded.key_fingerprint,
    -- A new process starts anew; a token that is renewed in mid-run does not.
    started_at = CASE WHEN r.instance_id IS DISTINCT FROM excluded.instance_id
        THEN excluded.started_at ELSE r.started_at
    END,
    registered_at = coalesce(r.registered_at, excluded.registered_at),
    last_heartbeat = excluded.last_heartbeat,
    status = CASE WHEN r.status = 'ACTIVE' THEN r.status ELSE excluded.status END
RETURNING runner_id, (xmax = 0) AS created

-- name: find
SELECT * FROM runners WHERE runner_id = $1

-- name: standing
-- A runner that has registered, beside what the allowlist says of its key.
SELECT r.capabilities, r.paused_at, r.pause_reason, k.capability_caps, k.max_leases
FROM runner_keys AS k
INNER JOIN runners AS r ON k.runner_id = r.runner_id
WHERE k.fingerprint = $1 AND r.capabilities IS NOT NULL

-- name: sign_off
UPDATE runners SET status = 'DEAD' WHERE runner_id = $1

-- name: remember_nonce
-- Nothing is returned when this key has used the nonce before. Nonces whose signature would be
-- refused by its age are forgotten on the way.
WITH forgotten AS (
    DELETE FROM registration_nonces
    WHERE fingerprint = $1 AND nonce <> $2 AND keep_until < clock_timestamp()
)

INSERT INTO registration_nonces (
    fingerprint, nonce, request_sha256, jti, issued_at, keep_until, created
) VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT DO NOTHING
RETURNING nonce

-- name: find_nonce
SELECT * FROM registration_nonces WHERE fingerprint = $1 AND nonce = $2
