-- migrate:up

-- The keys of the rings that processes sign with, by their fingerprints: a kid is one key in every
-- process and for ever, and a process whose kid is another key is told so before it serves. `held_at`
-- and `signed_at` say when a process last had the key in its ring, and in front of it.
CREATE TABLE IF NOT EXISTS ring_keys (
    ring text NOT NULL CHECK (ring IN ('token_keys', 'receipt_keys')),
    kid text NOT NULL,
    fingerprint text NOT NULL,
    first_held_at timestamptz NOT NULL DEFAULT now(),
    held_at timestamptz NOT NULL DEFAULT now(),
    signed_at timestamptz,
    PRIMARY KEY (ring, kid)
);

-- migrate:down

DROP TABLE ring_keys;
