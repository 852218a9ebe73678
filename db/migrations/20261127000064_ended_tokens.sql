-- migrate:up

-- The newest tokens of a key that were ended before their time. A claim locks the key's row, and so
-- reads this in its newest version: neither its snapshot nor what a process remembers of a token can
-- let a token claim that ended a moment ago. `revoked_tokens` has all of them.
ALTER TABLE runner_keys ADD COLUMN IF NOT EXISTS ended_tokens uuid [] NOT NULL DEFAULT '{}';

-- migrate:down

ALTER TABLE runner_keys DROP COLUMN ended_tokens;
