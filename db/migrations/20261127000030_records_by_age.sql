-- migrate:up transaction:false

-- A registration forgets the key's nonces that are too old, and reads no others for it: a key that
-- registers again and again would make each registration dearer than the last. Likewise a sign-off
-- and the tokens that have expired.
CREATE INDEX CONCURRENTLY IF NOT EXISTS registration_nonces_age
ON registration_nonces (fingerprint, keep_until);
CREATE INDEX CONCURRENTLY IF NOT EXISTS revoked_tokens_age ON revoked_tokens (expires_at);

-- migrate:down transaction:false

DROP INDEX CONCURRENTLY IF EXISTS revoked_tokens_age;
DROP INDEX CONCURRENTLY IF EXISTS registration_nonces_age;
