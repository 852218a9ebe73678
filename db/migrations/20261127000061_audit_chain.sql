-- migrate:up

-- The audit's hash chain: entry n holds the SHA-256 over the hash of entry n - 1 and a row of the
-- audit. Entries and rows are only ever added. Rows are chained behind the transactions that write
-- them (broker/audit_chain.py): a chain written by each would let all of them wait for each other.
CREATE TABLE audit_chain (
    seq bigint PRIMARY KEY,
    audit_id bigint NOT NULL UNIQUE,
    hash bytea NOT NULL CHECK (length(hash) = 32)
);
-- What is not chained yet. A row that commits late, with an older number than its neighbours, is
-- found here all the same.
CREATE TABLE audit_unchained (audit_id bigint PRIMARY KEY);
INSERT INTO audit_unchained SELECT audit_id FROM audit;
CREATE FUNCTION audit_to_be_chained() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO audit_unchained VALUES (new.audit_id);
    RETURN NULL;
END $$;
CREATE TRIGGER audit_grows AFTER INSERT ON audit
FOR EACH ROW EXECUTE FUNCTION audit_to_be_chained();

-- From where the runner last signed on: a new address, like a new process, is on the record.
ALTER TABLE runners ADD COLUMN IF NOT EXISTS address text;

-- migrate:down

ALTER TABLE runners DROP COLUMN address;
DROP TRIGGER audit_grows ON audit;
DROP FUNCTION audit_to_be_chained();
DROP TABLE audit_unchained, audit_chain;
