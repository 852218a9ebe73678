-- name: hold
-- Note that a process holds these keys, and signs with some. A kid that is known with another
-- fingerprint is left as it is, and is not returned; a row that is being written beside us is waited
-- for. In one order in every process, or two of them could deadlock.
INSERT INTO ring_keys AS k (ring, kid, fingerprint, signed_at)
SELECT t.ring, t.kid, t.fingerprint, CASE WHEN t.signs THEN statement_timestamp() END
FROM unnest($1::text [], $2::text [], $3::text [], $4::bool []) AS t (ring, kid, fingerprint, signs)
ORDER BY t.ring, t.kid
ON CONFLICT (ring, kid) DO UPDATE SET
held_at = statement_timestamp(), signed_at = coalesce(excluded.signed_at, k.signed_at)
WHERE k.fingerprint = excluded.fingerprint
RETURNING ring, kid

-- name: signing
-- The keys that a process signed with in the last $1.
SELECT ring, kid FROM ring_keys WHERE signed_at > statement_timestamp() - $1::interval
ORDER BY ring, kid

-- name: list
SELECT ring, kid, fingerprint, first_held_at, held_at, signed_at FROM ring_keys ORDER BY ring, kid

-- name: lock
-- A key, and whether a process held it in the last $3.
SELECT fingerprint, held_at, held_at > statement_timestamp() - $3::interval AS held
FROM ring_keys WHERE ring = $1 AND kid = $2
FOR UPDATE

-- name: forget
DELETE FROM ring_keys WHERE ring = $1 AND kid = $2
