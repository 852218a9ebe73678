-- migrate:up

-- Which process of its runner holds a lease. A machine that was restarted or cloned has two processes
-- of one key for a while: what one of them hands back, or its sign-off, ends no lease of the other.
ALTER TABLE run_queue ADD COLUMN IF NOT EXISTS lease_instance uuid;
ALTER TABLE run_archive ADD COLUMN IF NOT EXISTS lease_instance uuid;
CREATE OR REPLACE VIEW every_run AS SELECT * FROM run_queue UNION ALL SELECT * FROM run_archive;

-- `instance_id` is the process that registered last, since `started_at`. The one before it is kept, so
-- that its next registration is not taken for a new process. `second_process_seen_at` is when another
-- process than the newest last sent a request.
ALTER TABLE runners
ADD COLUMN IF NOT EXISTS previous_instance_id uuid,
ADD COLUMN IF NOT EXISTS previous_started_at timestamptz,
ADD COLUMN IF NOT EXISTS second_process_seen_at timestamptz;

-- migrate:down

ALTER TABLE runners
DROP COLUMN previous_instance_id,
DROP COLUMN previous_started_at,
DROP COLUMN second_process_seen_at;
DROP VIEW every_run;
ALTER TABLE run_archive DROP COLUMN lease_instance;
ALTER TABLE run_queue DROP COLUMN lease_instance;
CREATE VIEW every_run AS SELECT * FROM run_queue UNION ALL SELECT * FROM run_archive;
