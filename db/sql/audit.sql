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
