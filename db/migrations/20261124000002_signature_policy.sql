-- migrate:up

-- How a key's results are signed. A machine without an OIDC identity signs with the runner key itself,
-- if an admin accepts that: such a result names no Sigstore signer, and is in no transparency log.
ALTER TABLE runner_keys
ADD COLUMN signature_policy text NOT NULL DEFAULT 'sigstore'
CHECK (signature_policy IN ('sigstore', 'runner-key')),
ADD CHECK (signature_policy = 'sigstore' OR signer_identity IS NULL);

ALTER TABLE submissions
ALTER COLUMN signer_issuer DROP NOT NULL,
ALTER COLUMN log_index DROP NOT NULL,
ALTER COLUMN logged_at DROP NOT NULL,
ADD CONSTRAINT submissions_evidence CHECK (
    CASE trust
        WHEN 'sigstore'
            THEN signer_issuer IS NOT NULL AND log_index IS NOT NULL AND logged_at IS NOT NULL
        ELSE signer_issuer IS NULL AND log_index IS NULL AND logged_at IS NULL
    END
);

-- migrate:down

ALTER TABLE submissions
DROP CONSTRAINT submissions_evidence,
ALTER COLUMN signer_issuer SET NOT NULL,
ALTER COLUMN log_index SET NOT NULL,
ALTER COLUMN logged_at SET NOT NULL;
ALTER TABLE runner_keys DROP COLUMN signature_policy;
