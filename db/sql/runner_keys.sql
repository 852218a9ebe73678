-- name: find
SELECT * FROM runner_keys WHERE fingerprint = $1

-- name: find_for_share
-- Read under a lock that a revocation waits for, and that waits for a revocation.
SELECT * FROM runner_keys WHERE fingerprint = $1 FOR SHARE

-- name: list_all
SELECT * FROM runner_keys ORDER BY added_at, fingerprint

-- name: add
-- Admit a key. Nothing is returned when the key, or a good key of that runner, is already there.
INSERT INTO runner_keys (
    fingerprint, public_key, runner_id, description, added_by, not_after, max_leases,
    capability_caps, signer_identity, signer_issuer, signature_policy
) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
ON CONFLICT DO NOTHING
RETURNING *

-- name: runner_has_good_key
SELECT EXISTS (SELECT FROM runner_keys WHERE runner_id = $1 AND revoked_at IS NULL)

-- name: keep_others_out
-- A revocation's first step. FOR SHARE on a row never waits for an UPDATE that waits for that row, so
-- a key's own claims and registrations, each beginning before the last one ended, would keep its
-- revocation waiting for ever. Locks of a table are given in turn: what holds a key's row is
-- waited for, once, and what wants one from now on waits for us.
LOCK TABLE runner_keys IN EXCLUSIVE MODE

-- name: revoke
-- Claims of this key that began beside this transaction wait for it, and then see this version.
UPDATE runner_keys SET revoked_at = clock_timestamp(), revoked_reason = $2
WHERE fingerprint = $1 AND revoked_at IS NULL
RETURNING *

-- name: revoked_among
-- Which of these keys ($1) and token ids ($2) are revoked, expired or unknown: the answer that
-- counts when Redis cannot give one.
SELECT f AS fingerprint, NULL::uuid AS jti
FROM unnest($1::text []) AS f
WHERE NOT EXISTS (
    SELECT FROM runner_keys AS k
    WHERE k.fingerprint = f AND k.revoked_at IS NULL
        AND (k.not_after IS NULL OR k.not_after > clock_timestamp())
)
UNION ALL
SELECT NULL, jti FROM revoked_tokens WHERE jti = any($2::uuid [])

-- name: all_revocations
-- Everything Redis must know after it lost its memory: revoked keys whose tokens may still live
-- ($1, the life of a token), and revoked tokens.
SELECT fingerprint, NULL::uuid AS jti, revoked_at + $1::interval - clock_timestamp() AS remaining
FROM runner_keys WHERE revoked_at > clock_timestamp() - $1::interval
UNION ALL
SELECT NULL, jti, expires_at - clock_timestamp()
FROM revoked_tokens WHERE expires_at > clock_timestamp()

-- name: revoke_token
-- Tokens that no process takes any more are forgotten on the way. The key's row ($3) remembers the
-- newest: this waits for the claims that hold it, whose leases are seen from here on, and the later
-- ones wait for this. Every process has forgotten after a second that it took the others for good,
-- and no claim waits for longer than a minute.
WITH forgotten AS (DELETE FROM revoked_tokens WHERE expires_at < statement_timestamp()),

ended AS (
    UPDATE runner_keys SET ended_tokens = ($1::uuid || ended_tokens)[:100]
    WHERE fingerprint = $3 AND $1::uuid <> all(ended_tokens)
)

INSERT INTO revoked_tokens (jti, expires_at) VALUES ($1, $2) ON CONFLICT DO NOTHING
