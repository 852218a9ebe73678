-- migrate:up

-- Runs that a runner failed: it is not given one again before `until` (its own wish), nor while
-- another runner that fits, and has not failed it, is alive. The queue's own back-off for everybody
-- is run_queue.retry_after.
CREATE TABLE IF NOT EXISTS run_deferrals (
    run_id uuid NOT NULL REFERENCES runs ON DELETE CASCADE,
    runner_id text NOT NULL,
    until timestamptz NOT NULL,
    failed_at timestamptz NOT NULL,
    PRIMARY KEY (run_id, runner_id)
);
CREATE INDEX IF NOT EXISTS run_deferrals_runner ON run_deferrals (runner_id, failed_at);

-- Whether a live runner other than `failed_by` could take the run. Asked only for runs that a runner
-- failed, so the scan of the fleet is rare, and it ends at the first runner found.
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

-- migrate:down

DROP FUNCTION another_fits(uuid, text);
DROP TABLE run_deferrals;
