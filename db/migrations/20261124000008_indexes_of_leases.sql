-- migrate:up

-- Two small indexes that served any statement which names a live lease: while little was leased when
-- statistics were made they look like one page, and a submit, release or failure then read all of
-- one, with what had died there, instead of the one run it names. Each gets a second condition,
-- which only its own statements name. (Not the deadline: a column of an index that every heartbeat
-- changes would end their HOT updates.)
DROP INDEX run_queue_lease_key;
CREATE INDEX run_queue_lease_key ON run_queue (lease_key)
WHERE lease_id IS NOT NULL AND lease_key IS NOT NULL;
DROP INDEX run_queue_live;
CREATE INDEX run_queue_live ON run_queue (queue_id)
WHERE status IN ('CLAIMED', 'IN_PROGRESS') AND lease_slot IS NOT NULL;

-- migrate:down

DROP INDEX run_queue_live;
CREATE INDEX run_queue_live ON run_queue (queue_id) WHERE status IN ('CLAIMED', 'IN_PROGRESS');
DROP INDEX run_queue_lease_key;
CREATE INDEX run_queue_lease_key ON run_queue (lease_key) WHERE lease_id IS NOT NULL;
