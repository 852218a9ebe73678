-- name: add_token
INSERT INTO admin_tokens (token_sha256, name, scopes, expires_at) VALUES ($1, $2, $3, $4)
RETURNING token_id, name, scopes, created_at, expires_at, revoked_at

-- name: find_token
SELECT token_id, name, scopes FROM admin_tokens
WHERE
    token_sha256 = $1 AND revoked_at IS NULL
    AND (expires_at IS NULL OR expires_at > clock_timestamp())

-- name: list_tokens
SELECT token_id, name, scopes, created_at, expires_at, revoked_at FROM admin_tokens
ORDER BY created_at

-- name: revoke_token
UPDATE admin_tokens SET revoked_at = clock_timestamp()
WHERE token_id = $1 AND revoked_at IS NULL
RETURNING name

-- name: find_answer
SELECT request_sha256, answer FROM idempotency_keys WHERE actor = $1 AND idempotency_key = $2

-- name: remember_answer
INSERT INTO idempotency_keys (actor, idempotency_key, request_sha256, answer)
VALUES ($1, $2, $3, $4)

-- name: audit
INSERT INTO audit (actor, action, run_id, runner_id, detail) VALUES ($1, $2, $3, $4, $5)

-- name: lock_answer
-- Two requests of one key wait for each other; the second one finds the first one's answer.
SELECT pg_advisory_xact_lock(hashtext($1), hashtext($2))
