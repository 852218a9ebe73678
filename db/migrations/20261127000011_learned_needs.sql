-- migrate:up

-- VRAM that a model was seen to need beyond upstream's rule: an `oom` raises it above the VRAM that
-- failed, an accepted result lowers it to the measured peak, an admin forgets it. The rule is the
-- least that ever counts.
CREATE TABLE IF NOT EXISTS learned_needs (
    model_id uuid PRIMARY KEY REFERENCES models ON DELETE CASCADE,
    need_gb int NOT NULL,
    run_id uuid NOT NULL, -- whose failure or result it was learned from
    learned_at timestamptz NOT NULL
);

-- What a runner must have for a model, in GB: the one place where the rule and what was learned meet.
CREATE OR REPLACE VIEW model_vram AS
SELECT
    m.model_id, m.name, x.name AS quantization,
    vram_need_gb(m.active_parameter_count_b, m.parameter_count_b, x.vram_multiplier) AS rule_gb,
    greatest(
        vram_need_gb(m.active_parameter_count_b, m.parameter_count_b, x.vram_multiplier), l.need_gb
    ) AS need_gb,
    l.run_id AS learned_from, l.learned_at
FROM models AS m
INNER JOIN quantization_methods AS x ON m.quantization_id = x.quantization_id
LEFT JOIN learned_needs AS l ON m.model_id = l.model_id;

CREATE OR REPLACE FUNCTION another_fits(failed_run uuid, failed_by text) RETURNS boolean
STABLE LANGUAGE sql
BEGIN ATOMIC
SELECT EXISTS (
    SELECT FROM run_queue AS q
    INNER JOIN model_vram AS m ON q.model_id = m.model_id
    INNER JOIN model_vram AS j ON q.judge_model_id = j.model_id
    INNER JOIN runners AS r
        ON
            r.runner_id <> failed_by AND r.status IN ('ACTIVE', 'IDLE')
            AND NOT is_paused(r.paused_at, r.paused_until) AND r.drain_requested_at IS NULL
            AND r.capabilities -> 'quantizations' ?& ARRAY[m.quantization, j.quantization]
    INNER JOIN runner_keys AS k
        ON
            r.key_fingerprint = k.fingerprint AND k.revoked_at IS NULL
            AND (k.not_after IS NULL OR k.not_after > clock_timestamp())
            AND (
                k.capability_caps -> 'quantizations' IS NULL
                OR k.capability_caps -> 'quantizations' ?& ARRAY[m.quantization, j.quantization]
            )
            AND least(
                (r.capabilities ->> 'vram_gb')::int, (k.capability_caps ->> 'vram_gb')::int
            ) >= greatest(m.need_gb, j.need_gb)
    WHERE
        q.run_id = failed_run
        AND NOT EXISTS (
            SELECT FROM run_deferrals AS d
            WHERE d.run_id = failed_run AND d.runner_id = r.runner_id
        )
);
END;

-- migrate:down

CREATE OR REPLACE FUNCTION another_fits(failed_run uuid, failed_by text) RETURNS boolean
STABLE LANGUAGE sql
BEGIN ATOMIC
SELECT EXISTS (
    SELECT FROM run_queue AS q
    INNER JOIN models AS m ON q.model_id = m.model_id
    INNER JOIN quantization_methods AS x ON m.quantization_id = x.quantization_id
    INNER JOIN models AS j ON q.judge_model_id = j.model_id
    INNER JOIN quantization_methods AS y ON j.quantization_id = y.quantization_id
    INNER JOIN runners AS r
        ON
            r.runner_id <> failed_by AND r.status IN ('ACTIVE', 'IDLE')
            AND NOT is_paused(r.paused_at, r.paused_until) AND r.drain_requested_at IS NULL
            AND r.capabilities -> 'quantizations' ?& ARRAY[x.name, y.name]
    INNER JOIN runner_keys AS k
        ON
            r.key_fingerprint = k.fingerprint AND k.revoked_at IS NULL
            AND (k.not_after IS NULL OR k.not_after > clock_timestamp())
            AND (
                k.capability_caps -> 'quantizations' IS NULL
                OR k.capability_caps -> 'quantizations' ?& ARRAY[x.name, y.name]
            )
            AND least(
                (r.capabilities ->> 'vram_gb')::int, (k.capability_caps ->> 'vram_gb')::int
            ) >= greatest(
                vram_need_gb(m.active_parameter_count_b, m.parameter_count_b, x.vram_multiplier),
                vram_need_gb(j.active_parameter_count_b, j.parameter_count_b, y.vram_multiplier)
            )
    WHERE
        q.run_id = failed_run
        AND NOT EXISTS (
            SELECT FROM run_deferrals AS d
            WHERE d.run_id = failed_run AND d.runner_id = r.runner_id
        )
);
END;
DROP VIEW model_vram;
DROP TABLE learned_needs;
