-- migrate:up transaction:false

-- The trail is read newest first, by who, what and whom.
CREATE INDEX CONCURRENTLY IF NOT EXISTS audit_actor ON audit (actor, audit_id);
CREATE INDEX CONCURRENTLY IF NOT EXISTS audit_action ON audit (action, audit_id);
CREATE INDEX CONCURRENTLY IF NOT EXISTS audit_runner ON audit (runner_id, audit_id)
WHERE runner_id IS NOT NULL;

-- migrate:down transaction:false

DROP INDEX CONCURRENTLY IF EXISTS audit_runner;
DROP INDEX CONCURRENTLY IF EXISTS audit_action;
DROP INDEX CONCURRENTLY IF EXISTS audit_actor;
