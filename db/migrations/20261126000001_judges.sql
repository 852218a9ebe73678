-- migrate:up

-- A run whose answers a model judges needs memory for the judge as well: the harness has one model
-- in VRAM at a time, so a runner fits when it holds the larger of both. Where nothing is judged, the
-- judge is the model itself, and the queue of a (model, judge) pair is entered as one.
ALTER TABLE run_queue ADD COLUMN judge_model_id uuid REFERENCES models;
ALTER TABLE run_archive ADD COLUMN judge_model_id uuid REFERENCES models;
UPDATE run_queue SET judge_model_id = model_id WHERE job IS NOT NULL;
UPDATE run_archive SET judge_model_id = model_id;
ALTER TABLE run_queue ADD CONSTRAINT run_queue_judge_is_known CHECK (
    job IS NULL OR judge_model_id IS NOT NULL
);
ALTER TABLE run_archive ADD CONSTRAINT run_archive_judge_is_known CHECK (
    judge_model_id IS NOT NULL
);
CREATE OR REPLACE VIEW every_run AS SELECT * FROM run_queue UNION ALL SELECT * FROM run_archive;

DROP INDEX run_queue_ready;
CREATE INDEX run_queue_ready
ON run_queue (model_id, judge_model_id, priority, created_at, queue_id)
WHERE status = 'PENDING' AND job IS NOT NULL AND retry_after IS NULL;
DROP INDEX run_queue_deferred;
CREATE INDEX run_queue_deferred ON run_queue (model_id, judge_model_id, retry_after)
WHERE status = 'PENDING' AND job IS NOT NULL AND retry_after IS NOT NULL;

-- Whoever enqueues a config that is there already is told so.
CREATE INDEX run_queue_config ON run_queue (config_hash, created_at) WHERE job IS NOT NULL;
CREATE INDEX run_archive_config ON run_archive (config_hash, created_at);

-- The pairs of model and judge that have PENDING runs, each with its first ready run, if it has one,
-- and whether a deferred one has come due: an index probe each, however long their queues are. A
-- claim goes on from the first run and so steps only once over the entries of runs that were claimed
-- before, which stay in the index while some session holds an old snapshot.
DROP FUNCTION queue_heads();
CREATE FUNCTION queue_heads() RETURNS TABLE (
    model_id uuid, judge_model_id uuid, priority int, created_at timestamptz, queue_id uuid,
    due boolean
)
STABLE PARALLEL SAFE ROWS 30 LANGUAGE sql
BEGIN ATOMIC
WITH RECURSIVE ready AS (
    (
        SELECT q.model_id, q.judge_model_id, q.priority, q.created_at, q.queue_id
        FROM run_queue AS q
        WHERE q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NULL
        ORDER BY q.model_id, q.judge_model_id, q.priority, q.created_at, q.queue_id LIMIT 1
    )
    UNION ALL
    SELECT n.* FROM ready AS r
    CROSS JOIN LATERAL (
        SELECT q.model_id, q.judge_model_id, q.priority, q.created_at, q.queue_id
        FROM run_queue AS q
        WHERE
            q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NULL
            AND (q.model_id, q.judge_model_id) > (r.model_id, r.judge_model_id)
        ORDER BY q.model_id, q.judge_model_id, q.priority, q.created_at, q.queue_id LIMIT 1
    ) AS n
),

later AS (
    (
        SELECT q.model_id, q.judge_model_id, q.retry_after FROM run_queue AS q
        WHERE q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NOT NULL
        ORDER BY q.model_id, q.judge_model_id, q.retry_after LIMIT 1
    )
    UNION ALL
    SELECT n.* FROM later AS l
    CROSS JOIN LATERAL (
        SELECT q.model_id, q.judge_model_id, q.retry_after FROM run_queue AS q
        WHERE
            q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NOT NULL
            AND (q.model_id, q.judge_model_id) > (l.model_id, l.judge_model_id)
        ORDER BY q.model_id, q.judge_model_id, q.retry_after LIMIT 1
    ) AS n
)

SELECT
    coalesce(r.model_id, l.model_id), coalesce(r.judge_model_id, l.judge_model_id), r.priority,
    r.created_at, r.queue_id, coalesce(l.retry_after <= statement_timestamp(), false)
FROM ready AS r
FULL JOIN later AS l ON r.model_id = l.model_id AND r.judge_model_id = l.judge_model_id;
END;

-- migrate:down

DROP FUNCTION queue_heads();
CREATE FUNCTION queue_heads() RETURNS TABLE (
    model_id uuid, priority int, created_at timestamptz, queue_id uuid, due boolean
)
STABLE PARALLEL SAFE ROWS 30 LANGUAGE sql
BEGIN ATOMIC
WITH RECURSIVE ready AS (
    (
        SELECT q.model_id, q.priority, q.created_at, q.queue_id FROM run_queue AS q
        WHERE q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NULL
        ORDER BY q.model_id, q.priority, q.created_at, q.queue_id LIMIT 1
    )
    UNION ALL
    SELECT n.* FROM ready AS r
    CROSS JOIN LATERAL (
        SELECT q.model_id, q.priority, q.created_at, q.queue_id FROM run_queue AS q
        WHERE
            q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NULL
            AND q.model_id > r.model_id
        ORDER BY q.model_id, q.priority, q.created_at, q.queue_id LIMIT 1
    ) AS n
),

later AS (
    (
        SELECT q.model_id, q.retry_after FROM run_queue AS q
        WHERE q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NOT NULL
        ORDER BY q.model_id, q.retry_after LIMIT 1
    )
    UNION ALL
    SELECT n.* FROM later AS l
    CROSS JOIN LATERAL (
        SELECT q.model_id, q.retry_after FROM run_queue AS q
        WHERE
            q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NOT NULL
            AND q.model_id > l.model_id
        ORDER BY q.model_id, q.retry_after LIMIT 1
    ) AS n
)

SELECT
    coalesce(r.model_id, l.model_id), r.priority, r.created_at, r.queue_id,
    coalesce(l.retry_after <= statement_timestamp(), false)
FROM ready AS r FULL JOIN later AS l ON r.model_id = l.model_id;
END;
DROP INDEX run_archive_config, run_queue_config, run_queue_deferred, run_queue_ready;
CREATE INDEX run_queue_ready ON run_queue (model_id, priority, created_at, queue_id)
WHERE status = 'PENDING' AND job IS NOT NULL AND retry_after IS NULL;
CREATE INDEX run_queue_deferred ON run_queue (model_id, retry_after)
WHERE status = 'PENDING' AND job IS NOT NULL AND retry_after IS NOT NULL;
-- The view has the column: it is made again without it.
DROP VIEW every_run;
ALTER TABLE run_archive DROP COLUMN judge_model_id;
ALTER TABLE run_queue DROP COLUMN judge_model_id;
CREATE VIEW every_run AS SELECT * FROM run_queue UNION ALL SELECT * FROM run_archive;
