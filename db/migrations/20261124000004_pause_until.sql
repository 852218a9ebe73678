-- migrate:up

-- A pause may end by itself. One place says when a runner is paused, for every statement that asks.
ALTER TABLE runners ADD COLUMN paused_until timestamptz;
CREATE FUNCTION is_paused(paused_at timestamptz, paused_until timestamptz) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
RETURN paused_at IS NOT NULL AND coalesce(paused_until > now(), true);

-- migrate:down

DROP FUNCTION is_paused(timestamptz, timestamptz);
ALTER TABLE runners DROP COLUMN paused_until;
