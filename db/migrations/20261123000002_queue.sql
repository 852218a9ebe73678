-- migrate:up

-- What the queue adds to upstream's tables, and its own tables. Additive, so that a database with
-- rows in it keeps every one. A run_queue row of ours has a `job`; rows that bakeoff's own local
-- runner wrote have none, stay as they are, and are never handed out.

ALTER TABLE run_queue ALTER COLUMN prompt_id DROP NOT NULL;
ALTER TABLE run_queue
ADD COLUMN IF NOT EXISTS model_id uuid REFERENCES models,
ADD COLUMN IF NOT EXISTS job jsonb, -- tasks, floor_tasks, prompts, config: as handed out
ADD COLUMN IF NOT EXISTS config_hash text,
ADD COLUMN IF NOT EXISTS batch_id uuid,
ADD COLUMN IF NOT EXISTS max_runtime_s int,
-- The fence: +1 per claim, never reset.
ADD COLUMN IF NOT EXISTS lease_seq bigint NOT NULL DEFAULT 0,
-- The secret of the current lease. Kept after a lapse until the next claim, so that a late result
-- still finds its run; NULL after a release, a revocation and a cancel.
ADD COLUMN IF NOT EXISTS lease_id uuid,
ADD COLUMN IF NOT EXISTS lease_key text, -- fingerprint of the runner key that holds the lease
ADD COLUMN IF NOT EXISTS lease_expires_at timestamptz,
ADD COLUMN IF NOT EXISTS lease_slot int, -- 1..max_leases, unique among a runner's live leases
ADD COLUMN IF NOT EXISTS last_heartbeat timestamptz,
ADD COLUMN IF NOT EXISTS claim_key text, -- Idempotency-Key of the claim
ADD COLUMN IF NOT EXISTS claim_digest text, -- SHA-256 of the claim's body
ADD COLUMN IF NOT EXISTS cancel_requested_at timestamptz,
ADD COLUMN IF NOT EXISTS cancel_reason text,
ADD COLUMN IF NOT EXISTS requeued_at timestamptz,
ADD COLUMN IF NOT EXISTS progress jsonb,
ADD COLUMN IF NOT EXISTS result_sha256 text;

ALTER TABLE run_queue ADD CONSTRAINT run_queue_job_is_whole CHECK (
    job IS NULL OR (
        model_id IS NOT NULL
        AND status IN ('PENDING', 'CLAIMED', 'IN_PROGRESS', 'COMPLETE', 'FAILED', 'CANCELLED')
    )
);
-- A live lease has a deadline, a holder and a slot; nothing else has a deadline.
ALTER TABLE run_queue ADD CONSTRAINT run_queue_lease_is_whole CHECK (
    job IS NULL
    OR CASE WHEN status IN ('CLAIMED', 'IN_PROGRESS')
        THEN lease_expires_at IS NOT NULL AND lease_id IS NOT NULL AND claimed_by IS NOT NULL
            AND lease_slot IS NOT NULL AND lease_key IS NOT NULL
        ELSE lease_expires_at IS NULL AND lease_slot IS NULL AND claim_key IS NULL
    END
);

-- One row of ours per run. Upstream's rows may share a run_id (one per prompt), hence partial.
CREATE UNIQUE INDEX run_queue_run_id ON run_queue (run_id) WHERE job IS NOT NULL;
-- The claim reads the head of each fitting model's queue.
CREATE INDEX run_queue_pending_by_model ON run_queue (model_id, priority, created_at, queue_id)
WHERE status = 'PENDING' AND job IS NOT NULL;
-- The sweep reads the few thousand live rows. lease_expires_at itself must stay out of every
-- index: with it, each heartbeat would be a non-HOT update.
CREATE INDEX run_queue_live ON run_queue (queue_id) WHERE status IN ('CLAIMED', 'IN_PROGRESS');
-- A claim that is sent twice finds its lease; the loser of a race hits this and looks again.
CREATE UNIQUE INDEX run_queue_claim_key ON run_queue (claimed_by, claim_key)
WHERE claim_key IS NOT NULL;
-- max_leases holds under concurrent claims: two claims cannot take the same slot.
CREATE UNIQUE INDEX run_queue_lease_slot ON run_queue (claimed_by, lease_slot)
WHERE lease_slot IS NOT NULL;
-- Revoking a key finds what it holds.
CREATE INDEX run_queue_lease_key ON run_queue (lease_key) WHERE lease_id IS NOT NULL;
-- The admin's list, newest first, by status.
CREATE INDEX run_queue_listed ON run_queue (created_at, run_id) WHERE job IS NOT NULL;

ALTER TABLE run_queue SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.01);

-- Upstream's rule: GB a model needs, calculated and never stored. The float is made numeric first:
-- 10 * 2.000 * 1.15 is 23 GB, and not 23.000000000000004 rounded up to 24.
CREATE FUNCTION vram_need_gb(
    active_parameter_count_b double precision,
    parameter_count_b double precision,
    vram_multiplier numeric
) RETURNS int IMMUTABLE PARALLEL SAFE LANGUAGE sql
RETURN ceil(coalesce(active_parameter_count_b, parameter_count_b)::numeric * vram_multiplier * 1.15);

-- The allowlist.
CREATE TABLE runner_keys (
    fingerprint text PRIMARY KEY, -- hex SHA-256 of the raw key
    public_key bytea NOT NULL UNIQUE CHECK (length(public_key) = 32),
    runner_id text NOT NULL,
    description text,
    added_at timestamptz NOT NULL DEFAULT now(),
    added_by text NOT NULL,
    not_after timestamptz,
    max_leases int CHECK (max_leases BETWEEN 1 AND 64),
    capability_caps jsonb,
    signer_identity text,
    signer_issuer text,
    revoked_at timestamptz,
    revoked_reason text,
    CHECK ((signer_identity IS NULL) = (signer_issuer IS NULL))
);
-- A name belongs to one good key at a time; after a revocation a new key may carry it on.
CREATE UNIQUE INDEX runner_keys_runner_id ON runner_keys (runner_id) WHERE revoked_at IS NULL;

ALTER TABLE runners
ADD COLUMN IF NOT EXISTS capabilities jsonb,
ADD COLUMN IF NOT EXISTS instance_id uuid,
ADD COLUMN IF NOT EXISTS version text,
ADD COLUMN IF NOT EXISTS key_fingerprint text REFERENCES runner_keys,
ADD COLUMN IF NOT EXISTS paused_at timestamptz,
ADD COLUMN IF NOT EXISTS pause_reason text,
ADD COLUMN IF NOT EXISTS resumed_at timestamptz,
ADD COLUMN IF NOT EXISTS drain_requested_at timestamptz;

-- The ledger: every lease leaves a row.
CREATE TABLE attempts (
    run_id uuid NOT NULL REFERENCES runs ON DELETE CASCADE,
    lease_seq bigint NOT NULL,
    lease_id uuid NOT NULL UNIQUE,
    runner_id text NOT NULL,
    key_fingerprint text NOT NULL,
    claimed_at timestamptz NOT NULL,
    started_at timestamptz,
    last_heartbeat timestamptz,
    ended_at timestamptz,
    how text CHECK (
        how IN ('completed', 'released', 'lapsed', 'failed', 'cancelled', 'revoked')
    ),
    failure_code text,
    detail text,
    progress jsonb,
    -- What the lease's end answered, so that a repeated request gets the same answer.
    outcome jsonb,
    PRIMARY KEY (run_id, lease_seq),
    CHECK ((ended_at IS NULL) = (how IS NULL))
);
CREATE INDEX attempts_runner ON attempts (runner_id, claimed_at);

-- A registration seen once is answered the same way until its signature is too old anyway.
CREATE TABLE registration_nonces (
    fingerprint text NOT NULL REFERENCES runner_keys,
    nonce text NOT NULL,
    request_sha256 text NOT NULL,
    jti uuid NOT NULL,
    issued_at timestamptz NOT NULL,
    keep_until timestamptz NOT NULL,
    created bool NOT NULL,
    PRIMARY KEY (fingerprint, nonce)
);

-- Redis only speeds up the answer: a flush must not un-revoke.
CREATE TABLE revoked_tokens (
    jti uuid PRIMARY KEY,
    expires_at timestamptz NOT NULL
);

CREATE TABLE admin_tokens (
    token_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    token_sha256 bytea NOT NULL UNIQUE CHECK (length(token_sha256) = 32),
    name text NOT NULL,
    scopes text[] NOT NULL CHECK (
        scopes <@ ARRAY['read', 'operate', 'admin'] AND cardinality(scopes) > 0
    ),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz
);

-- An admin's POST that is sent twice gets its first answer.
CREATE TABLE idempotency_keys (
    actor text NOT NULL,
    idempotency_key text NOT NULL,
    request_sha256 text NOT NULL,
    answer jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (actor, idempotency_key)
);

-- What was accepted, byte for byte, so that each metric row can be verified again years later.
CREATE TABLE submissions (
    run_id uuid PRIMARY KEY REFERENCES runs ON DELETE CASCADE,
    receipt_id uuid NOT NULL UNIQUE DEFAULT gen_random_uuid(),
    lease_seq bigint NOT NULL,
    runner_id text NOT NULL,
    key_fingerprint text NOT NULL,
    result_sha256 text NOT NULL,
    signer_identity text NOT NULL,
    signer_issuer text NOT NULL,
    log_index bigint NOT NULL,
    logged_at timestamptz NOT NULL,
    trust text NOT NULL DEFAULT 'sigstore' CHECK (trust IN ('sigstore', 'runner-key')),
    state text NOT NULL DEFAULT 'accepted' CHECK (
        state IN ('accepted', 'superseded', 'disputed', 'revoked')
    ),
    model_metrics int NOT NULL,
    hardware_metrics int NOT NULL,
    accepted_at timestamptz NOT NULL
);
CREATE INDEX submissions_key ON submissions (key_fingerprint);

CREATE TABLE submission_files (
    run_id uuid NOT NULL REFERENCES submissions ON DELETE CASCADE,
    name text NOT NULL,
    sha256 text NOT NULL,
    content bytea NOT NULL,
    PRIMARY KEY (run_id, name)
);
-- Bundles are read back whole and rarely: compress them outside the row.
ALTER TABLE submission_files ALTER COLUMN content SET STORAGE EXTENDED;

-- Refusals count against the runner.
CREATE TABLE submission_refusals (
    refusal_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    refused_at timestamptz NOT NULL DEFAULT now(),
    run_id uuid NOT NULL REFERENCES runs ON DELETE CASCADE,
    runner_id text NOT NULL,
    key_fingerprint text NOT NULL,
    code text NOT NULL,
    detail text NOT NULL
);
CREATE INDEX submission_refusals_runner ON submission_refusals (runner_id, refused_at);

CREATE TABLE audit (
    audit_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor text NOT NULL, -- admin:<name>, runner:<id>, or system
    action text NOT NULL,
    run_id uuid,
    runner_id text,
    detail jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX audit_run ON audit (run_id, audit_id);

-- migrate:down

DROP TABLE audit, submission_refusals, submission_files, submissions, idempotency_keys,
admin_tokens, revoked_tokens, registration_nonces, attempts;
ALTER TABLE runners
DROP COLUMN capabilities, DROP COLUMN instance_id, DROP COLUMN version,
DROP COLUMN key_fingerprint, DROP COLUMN paused_at, DROP COLUMN pause_reason,
DROP COLUMN resumed_at, DROP COLUMN drain_requested_at;
DROP TABLE runner_keys;
DROP FUNCTION vram_need_gb(double precision, double precision, numeric);
-- Our rows need our columns: without them they would look like upstream's.
DELETE FROM run_queue WHERE job IS NOT NULL;
ALTER TABLE run_queue ALTER COLUMN prompt_id SET NOT NULL;
DROP INDEX run_queue_live;
ALTER TABLE run_queue RESET (fillfactor, autovacuum_vacuum_scale_factor);
ALTER TABLE run_queue
DROP CONSTRAINT run_queue_job_is_whole, DROP CONSTRAINT run_queue_lease_is_whole,
DROP COLUMN model_id, DROP COLUMN job, DROP COLUMN config_hash, DROP COLUMN batch_id,
DROP COLUMN max_runtime_s, DROP COLUMN lease_seq, DROP COLUMN lease_id, DROP COLUMN lease_key,
DROP COLUMN lease_expires_at, DROP COLUMN lease_slot, DROP COLUMN last_heartbeat,
DROP COLUMN claim_key, DROP COLUMN claim_digest, DROP COLUMN cancel_requested_at,
DROP COLUMN cancel_reason, DROP COLUMN requeued_at, DROP COLUMN progress, DROP COLUMN result_sha256;
