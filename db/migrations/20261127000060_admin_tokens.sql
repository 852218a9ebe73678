-- migrate:up

-- The audit trail names an admin by the name of the token: no two living tokens share one. Of tokens
-- that do, the oldest keeps the name.
UPDATE admin_tokens AS t SET name = t.name || '-' || left(t.token_id::text, 8)
WHERE
    t.revoked_at IS NULL
    AND EXISTS (
        SELECT FROM admin_tokens AS o
        WHERE
            o.name = t.name AND o.revoked_at IS NULL
            AND (o.created_at, o.token_id) < (t.created_at, t.token_id)
    );
CREATE UNIQUE INDEX IF NOT EXISTS admin_tokens_name ON admin_tokens (name)
WHERE revoked_at IS NULL;
ALTER TABLE admin_tokens
ADD COLUMN IF NOT EXISTS minted_by text NOT NULL DEFAULT 'unknown',
ADD COLUMN IF NOT EXISTS revoked_by text,
ADD COLUMN IF NOT EXISTS revoked_reason text;

-- Whom an action was about, from where it was asked for, and by which token.
ALTER TABLE audit
ADD COLUMN IF NOT EXISTS target text,
ADD COLUMN IF NOT EXISTS address text,
ADD COLUMN IF NOT EXISTS token_id uuid;

-- Where a runner's token was given to: what tells a stolen one from the others of the runner.
ALTER TABLE registration_nonces ADD COLUMN IF NOT EXISTS address text;

-- migrate:down

ALTER TABLE registration_nonces DROP COLUMN address;
ALTER TABLE audit DROP COLUMN target, DROP COLUMN address, DROP COLUMN token_id;
DROP INDEX admin_tokens_name;
ALTER TABLE admin_tokens
DROP COLUMN minted_by, DROP COLUMN revoked_by, DROP COLUMN revoked_reason;
