-- migrate:up

-- What an admin decided about an accepted result, last: the reason, who, when. The whole history is
-- in `audit`, where each decision has a row of the same transaction.
ALTER TABLE submissions
ADD COLUMN state_reason text,
ADD COLUMN state_changed_by text,
ADD COLUMN state_changed_at timestamptz;
UPDATE submissions SET
    state_reason = 'changed before reasons were kept', state_changed_by = 'unknown',
    state_changed_at = now()
WHERE state <> 'accepted';
ALTER TABLE submissions ADD CONSTRAINT submissions_state_has_its_reason CHECK (
    num_nulls(state_reason, state_changed_by, state_changed_at) IN (0, 3)
    AND (state = 'accepted' OR state_reason IS NOT NULL)
);
-- The admin's list and the export, in the order of acceptance.
CREATE INDEX submissions_listed ON submissions (accepted_at, run_id);

-- For readers of run_model_metrics: a moderated result's rows stay, and this view says which runs
-- count now. Of our own tables only: bakeoff may alter its own, which a view on them would forbid.
CREATE VIEW accepted_results AS
SELECT
    run_id, result_sha256, trust, signer_identity, signer_issuer, log_index, logged_at, runner_id,
    key_fingerprint, receipt_id, accepted_at
FROM submissions
WHERE state = 'accepted';
COMMENT ON VIEW accepted_results IS
'Runs whose result is accepted and neither superseded, disputed nor revoked: JOIN it by run_id.';

-- migrate:down

DROP VIEW accepted_results;
DROP INDEX submissions_listed;
ALTER TABLE submissions
DROP CONSTRAINT submissions_state_has_its_reason,
DROP COLUMN state_reason, DROP COLUMN state_changed_by, DROP COLUMN state_changed_at;
