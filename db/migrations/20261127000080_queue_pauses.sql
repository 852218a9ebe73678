-- migrate:up

-- Pauses of the whole queue (model_id is null) or of one model: no run of it is handed out until
-- `until`, or until an admin resumes it. Leases that live go on.
CREATE TABLE IF NOT EXISTS queue_pauses (
    scope text PRIMARY KEY, -- 'queue', or the model_id
    model_id uuid REFERENCES models ON DELETE CASCADE,
    reason text NOT NULL,
    paused_at timestamptz NOT NULL,
    until timestamptz,
    paused_by text NOT NULL,
    CHECK (scope = coalesce(model_id::text, 'queue'))
);

-- Why a run of this model and judge is not handed out now; null when it may be.
CREATE OR REPLACE FUNCTION pause_of(model uuid, judge uuid) RETURNS text
STABLE PARALLEL SAFE LANGUAGE sql
BEGIN ATOMIC
SELECT p.reason FROM queue_pauses AS p
WHERE
    (p.model_id IS NULL OR p.model_id IN (model, judge)) AND is_paused(p.paused_at, p.until)
ORDER BY p.model_id NULLS FIRST LIMIT 1;
END;

-- The runners that have registered here, by what decides what they may be given. `quantizations` and
-- `vram_gb` are those declared, cut to the caps of the key.
CREATE OR REPLACE VIEW fleet AS
SELECT
    r.runner_id, r.last_heartbeat, k.max_leases,
    least((r.capabilities ->> 'vram_gb')::int, (k.capability_caps ->> 'vram_gb')::int) AS vram_gb,
    ARRAY(
        SELECT x.name FROM jsonb_array_elements_text(r.capabilities -> 'quantizations') AS x (name)
        WHERE
            k.capability_caps -> 'quantizations' IS NULL
            OR k.capability_caps -> 'quantizations' ? x.name
    ) AS quantizations,
    k.revoked_at IS NOT NULL OR coalesce(k.not_after <= clock_timestamp(), false) AS revoked,
    is_paused(r.paused_at, r.paused_until) AS paused,
    r.drain_requested_at IS NOT NULL AS draining,
    r.status = 'DEAD' AS dead
FROM runners AS r
INNER JOIN runner_keys AS k ON r.key_fingerprint = k.fingerprint
WHERE r.capabilities IS NOT NULL;

-- migrate:down

DROP VIEW fleet;
DROP FUNCTION pause_of(uuid, uuid);
DROP TABLE queue_pauses;
