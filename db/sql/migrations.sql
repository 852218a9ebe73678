-- name: is_known
SELECT to_regclass('schema_migrations') IS NOT NULL

-- name: make_table
-- As dbmate makes it: either of them may go on where the other stopped.
CREATE TABLE IF NOT EXISTS schema_migrations (version varchar NOT NULL PRIMARY KEY)

-- name: applied
SELECT version FROM schema_migrations

-- name: record
INSERT INTO schema_migrations (version) VALUES ($1)

-- name: forget
DELETE FROM schema_migrations WHERE version = $1

-- name: keep_transaction
-- A role's own time-outs would end the transaction that holds the lock. (transaction_timeout is of
-- PostgreSQL 17.)
SELECT set_config(name, '0', true) FROM pg_settings
WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout')

-- name: try_lock
SELECT pg_try_advisory_xact_lock(hashtext('bakeoff_queue.migrate'))

-- name: set
SELECT set_config($1, $2, $3)

-- name: is_invalid
SELECT EXISTS (
    SELECT FROM pg_index WHERE indexrelid = to_regclass($1) AND NOT indisvalid
)

-- name: blockers
-- By the name of its session: behind a pooler nobody knows its process id.
SELECT
    b.pid, s.application_name, s.usename, host(s.client_addr) AS client, s.state,
    extract(EPOCH FROM clock_timestamp() - s.xact_start)::float8 AS seconds
FROM pg_stat_activity AS w
CROSS JOIN LATERAL unnest(pg_blocking_pids(w.pid)) AS b (pid)
LEFT JOIN pg_stat_activity AS s ON b.pid = s.pid
WHERE w.application_name = $1 AND w.datname = current_database()
