-- name: add_token
-- Nothing is returned when a living token has the name.
INSERT INTO admin_tokens (token_sha256, name, scopes, expires_at, minted_by)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT DO NOTHING
RETURNING token_id, name, scopes, created_at, expires_at, minted_by

-- name: find_token
SELECT token_id, name, scopes FROM admin_tokens
WHERE
    token_sha256 = $1 AND revoked_at IS NULL
    AND (expires_at IS NULL OR expires_at > clock_timestamp())

-- name: list_tokens
SELECT
    token_id, name, scopes, created_at, expires_at, minted_by, revoked_at, revoked_by,
    revoked_reason
FROM admin_tokens
ORDER BY created_at, token_id

-- name: lock_keepers
-- The living tokens that can mint and revoke others, locked: of two admins who revoke each the
-- other's token, the second one waits here, and sees that it would be the last.
SELECT token_id FROM admin_tokens
WHERE
    'admin' = any(scopes) AND revoked_at IS NULL
    AND (expires_at IS NULL OR expires_at > clock_timestamp())
ORDER BY token_id FOR UPDATE

-- name: lock_token
SELECT token_id, name, revoked_at FROM admin_tokens WHERE token_id = $1 FOR UPDATE

-- name: revoke_token
UPDATE admin_tokens SET
    revoked_at = clock_timestamp(), revoked_by = $2, revoked_reason = $3
WHERE token_id = $1
RETURNING token_id, name, revoked_at

-- name: find_answer
SELECT request_sha256, answer FROM idempotency_keys WHERE actor = $1 AND idempotency_key = $2

-- name: remember_answer
INSERT INTO idempotency_keys (actor, idempotency_key, request_sha256, answer)
VALUES ($1, $2, $3, $4)

-- name: lock_answer
-- Two requests of one key wait for each other; the second one finds the first one's answer.
SELECT pg_advisory_xact_lock(hashtext($1), hashtext($2))
