-- migrate:up

-- The receipt exactly as it was signed and given: a later key signs differently, and a repeated
-- submit must get the same answer. Results from before receipts were signed have one without `sig`.
ALTER TABLE submissions ADD COLUMN receipt jsonb;
UPDATE submissions SET receipt = jsonb_build_object(
    'run_id', run_id,
    'receipt_id', receipt_id,
    'result_sha256', result_sha256,
    'accepted_at', to_char(accepted_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
    'signer', jsonb_build_object(
        'identity', signer_identity, 'issuer', signer_issuer, 'log_index', log_index
    ),
    'rows', jsonb_build_object(
        'model_metrics', model_metrics, 'hardware_metrics', hardware_metrics
    )
);
ALTER TABLE submissions ALTER COLUMN receipt SET NOT NULL;

-- migrate:down

ALTER TABLE submissions DROP COLUMN receipt;
