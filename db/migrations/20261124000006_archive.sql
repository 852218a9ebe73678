-- migrate:up

-- Old runs. A finished run moves, with its ledger, out of the tables that claims, heartbeats and the
-- sweep work on, so that a million finished runs cost those nothing. An archived run is read like
-- any other, through the two views below, and a FAILED or CANCELLED one moves back when an admin
-- puts it into the queue again. Rows that bakeoff's own runner wrote (no job) stay where they are.
--
-- The archive has the columns of its tables, in their order: whoever adds one to run_queue or to
-- attempts adds it to the archive as well, and makes the view again. A test compares them.
CREATE TABLE run_archive (
    LIKE run_queue INCLUDING DEFAULTS INCLUDING CONSTRAINTS,
    PRIMARY KEY (run_id),
    FOREIGN KEY (run_id) REFERENCES runs ON DELETE CASCADE,
    FOREIGN KEY (model_id) REFERENCES models,
    CONSTRAINT run_archive_is_finished CHECK (
        job IS NOT NULL AND status IN ('COMPLETE', 'FAILED', 'CANCELLED')
        AND completed_at IS NOT NULL
    )
);
-- The admin's list, with a state and without.
CREATE INDEX run_archive_listed ON run_archive (created_at, run_id);
CREATE INDEX run_archive_listed_by_status ON run_archive (status, created_at, run_id);
-- Prune looks for the oldest ones that have no result.
CREATE INDEX run_archive_failed ON run_archive (completed_at) WHERE status <> 'COMPLETE';

CREATE TABLE attempts_archive (
    LIKE attempts INCLUDING DEFAULTS INCLUDING CONSTRAINTS,
    PRIMARY KEY (run_id, lease_seq),
    FOREIGN KEY (run_id) REFERENCES runs ON DELETE CASCADE,
    CONSTRAINT attempts_archive_has_ended CHECK (ended_at IS NOT NULL)
);
CREATE INDEX attempts_archive_ended ON attempts_archive (ended_at);

CREATE VIEW every_run AS SELECT * FROM run_queue UNION ALL SELECT * FROM run_archive;
CREATE VIEW every_attempt AS SELECT * FROM attempts UNION ALL SELECT * FROM attempts_archive;

-- What the archiver looks for, and what counts the finished runs that are not archived yet. No
-- heartbeat changes either column.
CREATE INDEX run_queue_finished ON run_queue (completed_at, queue_id) INCLUDE (status)
WHERE status IN ('COMPLETE', 'FAILED', 'CANCELLED') AND job IS NOT NULL;

-- How many runs are archived, by state: the sum of these rows. Nobody has to count a million runs,
-- and as nobody updates a common row, nobody waits. Triggers write them, so that the sum is right
-- whatever deletes a run.
CREATE TABLE run_archive_changes (
    change_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    status text NOT NULL,
    runs bigint NOT NULL
);
CREATE FUNCTION count_archived() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO run_archive_changes (status, runs)
    SELECT c.status, CASE WHEN tg_op = 'INSERT' THEN count(*) ELSE -count(*) END
    FROM changed AS c GROUP BY c.status;
    RETURN NULL;
END $$;
CREATE TRIGGER run_archive_grows AFTER INSERT ON run_archive
REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION count_archived();
CREATE TRIGGER run_archive_shrinks AFTER DELETE ON run_archive
REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION count_archived();

-- Prune looks for the oldest ones.
CREATE INDEX submission_refusals_age ON submission_refusals (refused_at);
CREATE INDEX idempotency_keys_age ON idempotency_keys (created_at);

-- migrate:down

DROP INDEX idempotency_keys_age, submission_refusals_age, run_queue_finished;
DROP VIEW every_attempt, every_run;
-- Archived runs go back where they came from: none is lost.
INSERT INTO run_queue SELECT * FROM run_archive;
INSERT INTO attempts SELECT * FROM attempts_archive;
DROP TABLE attempts_archive, run_archive, run_archive_changes;
DROP FUNCTION count_archived();
