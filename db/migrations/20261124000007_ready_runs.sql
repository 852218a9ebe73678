-- migrate:up

-- The claim reads the head of each fitting model's queue, and walks over nothing else: runs that are
-- deferred stand in an index of their own, or a claim would step over each of them.
DROP INDEX run_queue_pending_by_model;
CREATE INDEX run_queue_ready ON run_queue (model_id, priority, created_at, queue_id)
WHERE status = 'PENDING' AND job IS NOT NULL AND retry_after IS NULL;
CREATE INDEX run_queue_deferred ON run_queue (model_id, retry_after)
WHERE status = 'PENDING' AND job IS NOT NULL AND retry_after IS NOT NULL;

-- The models that have PENDING runs, ready or deferred: an index probe each, however long their
-- queues are.
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

-- migrate:down

DROP FUNCTION waiting_models();
DROP INDEX run_queue_deferred;
DROP INDEX run_queue_ready;
CREATE INDEX run_queue_pending_by_model ON run_queue (model_id, priority, created_at, queue_id)
WHERE status = 'PENDING' AND job IS NOT NULL;
