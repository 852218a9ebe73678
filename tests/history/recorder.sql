-- What the checker adds to the database of a storm: every transition of a run, by the clock of the
-- database, in the transaction that made it. Production knows nothing of it.

CREATE TABLE history (
    step bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- in lock order among one run's rows
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    run_id uuid NOT NULL,
    old_status text,
    new_status text NOT NULL,
    old_seq bigint,
    new_seq bigint NOT NULL,
    old_lease uuid,
    new_lease uuid,
    old_holder text,
    new_holder text,
    old_key text,
    new_key text,
    old_deadline timestamptz,
    new_deadline timestamptz
);
CREATE INDEX history_run ON history (run_id, step);
CREATE INDEX history_lease ON history (new_lease);

CREATE FUNCTION record_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.job IS NULL THEN
        RETURN NULL;
    END IF;
    IF TG_OP = 'INSERT' THEN
        INSERT INTO history (run_id, new_status, new_seq, new_lease, new_holder, new_key,
            new_deadline)
        VALUES (NEW.run_id, NEW.status, NEW.lease_seq, NEW.lease_id, NEW.claimed_by,
            NEW.lease_key, NEW.lease_expires_at);
    ELSE
        INSERT INTO history (run_id, old_status, new_status, old_seq, new_seq, old_lease,
            new_lease, old_holder, new_holder, old_key, new_key, old_deadline, new_deadline)
        VALUES (NEW.run_id, OLD.status, NEW.status, OLD.lease_seq, NEW.lease_seq, OLD.lease_id,
            NEW.lease_id, OLD.claimed_by, NEW.claimed_by, OLD.lease_key, NEW.lease_key,
            OLD.lease_expires_at, NEW.lease_expires_at);
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER history_recorder AFTER INSERT OR UPDATE ON run_queue
FOR EACH ROW EXECUTE FUNCTION record_transition();

-- Revocations, at the last moment before their commit: the trigger is deferred to it.
CREATE TABLE revocations (fingerprint text NOT NULL, at timestamptz NOT NULL);

CREATE FUNCTION record_revocation() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO revocations VALUES (NEW.fingerprint, clock_timestamp());
    RETURN NULL;
END
$$;

CREATE CONSTRAINT TRIGGER revocation_recorder AFTER UPDATE ON runner_keys
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
WHEN (OLD.revoked_at IS NULL AND NEW.revoked_at IS NOT NULL)
EXECUTE FUNCTION record_revocation();

-- What clients saw, written after the storm: one row per answer that reached its sender. Times are
-- of the same machine's clock as the database's.
CREATE TABLE client_log (
    verb text NOT NULL,
    runner_id text NOT NULL,
    fingerprint text NOT NULL,
    request text NOT NULL, -- the same bytes have the same name
    sent_at timestamptz NOT NULL,
    received_at timestamptz NOT NULL,
    status int NOT NULL,
    code text,
    claim_key text,
    run_id uuid, -- of the address, or of the job that a claim was answered with
    lease_id uuid, -- as the request says, or as a claim was answered with
    result_sha256 text, -- as submitted
    receipt_sha256 text, -- as the receipt has it
    receipt_id uuid
);
CREATE INDEX client_log_claims ON client_log (runner_id, claim_key);

-- What clients sent about leases, answered or not.
CREATE TABLE client_sent (
    verb text NOT NULL,
    runner_id text NOT NULL,
    lease_id uuid NOT NULL,
    result_sha256 text
);
CREATE INDEX client_sent_lease ON client_sent (lease_id);

-- The faults that invariants must know of.
CREATE TABLE fault_log (kind text NOT NULL, at timestamptz NOT NULL);
