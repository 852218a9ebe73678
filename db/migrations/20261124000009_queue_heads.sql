-- migrate:up

-- The models that have PENDING runs, each with its first ready run, if it has one, and whether a
-- deferred one has come due: an index probe each, however long their queues are. A claim goes on
-- from the first run and so steps only once over the entries of runs that were claimed before, which
-- stay in the index while some session holds an old snapshot.
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
DROP FUNCTION waiting_models();

-- migrate:down

CREATE FUNCTION waiting_models() RETURNS TABLE (model_id uuid)
STABLE PARALLEL SAFE ROWS 30 LANGUAGE sql
BEGIN ATOMIC
WITH RECURSIVE waiting (model_id) AS (
    SELECT least(
        (
            SELECT q.model_id FROM run_queue AS q
            WHERE q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NULL
            ORDER BY q.model_id LIMIT 1
        ),
        (
            SELECT q.model_id FROM run_queue AS q
            WHERE q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NOT NULL
            ORDER BY q.model_id LIMIT 1
        )
    )
    UNION ALL
    SELECT least(
        (
            SELECT q.model_id FROM run_queue AS q
            WHERE
                q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NULL
                AND q.model_id > w.model_id
            ORDER BY q.model_id LIMIT 1
        ),
        (
            SELECT q.model_id FROM run_queue AS q
            WHERE
                q.status = 'PENDING' AND q.job IS NOT NULL AND q.retry_after IS NOT NULL
                AND q.model_id > w.model_id
            ORDER BY q.model_id LIMIT 1
        )
    )
    FROM waiting AS w WHERE w.model_id IS NOT NULL
)
SELECT w.model_id FROM waiting AS w WHERE w.model_id IS NOT NULL;
END;
DROP FUNCTION queue_heads();
