-- name: lookups
-- The names upstream knows, by kind; an unknown one is refused, never inserted.
SELECT 'quantization' AS kind, name, quantization_id AS id FROM quantization_methods
UNION ALL
SELECT 'architecture', name, architecture_id FROM model_architectures
UNION ALL
SELECT 'file_format', name, file_format_id FROM model_file_formats
UNION ALL
SELECT 'source_type', name, source_type_id FROM source_types

-- name: add_creators
INSERT INTO creators (
    creator_id, name, display_name, homepage, service_identifiers, provisional
)
SELECT * FROM unnest(
    $1::uuid [], $2::text [], $3::text [], $4::text [], $5::jsonb [], $6::bool []
)
ON CONFLICT DO NOTHING

-- name: add
-- Get-or-create: what is known of a model is not overwritten by a later descriptor. A predecessor
-- that is not in the database (a model that was never queued here) is left out.
INSERT INTO models (
    model_id, name, creator_id, model_hash, parameter_count_b, active_parameter_count_b,
    architecture_id, context_length_default, context_length_min, context_length_max,
    file_format_id, quantization_id, model_source_mtime, model_source_size, release_date, version,
    description, predecessor_model_id, provisional
)
SELECT
    t.model_id, t.name, t.creator_id, t.model_hash, t.parameter_count_b,
    t.active_parameter_count_b, t.architecture_id, t.context_length_default, t.context_length_min,
    t.context_length_max, t.file_format_id, t.quantization_id, t.model_source_mtime,
    t.model_source_size, t.release_date, t.version, t.description, p.model_id, t.provisional
FROM unnest(
    $1::uuid [], $2::text [], $3::uuid [], $4::text [], $5::float8 [], $6::float8 [],
    $7::int [], $8::int [], $9::int [], $10::int [],
    $11::int [], $12::int [], $13::timestamptz [], $14::bigint [], $15::date [], $16::text [],
    $17::text [], $18::uuid [], $19::bool []
) AS t (
    model_id, name, creator_id, model_hash, parameter_count_b, active_parameter_count_b,
    architecture_id, context_length_default, context_length_min, context_length_max,
    file_format_id, quantization_id, model_source_mtime, model_source_size, release_date, version,
    description, predecessor_model_id, provisional
)
LEFT JOIN models AS p ON t.predecessor_model_id = p.model_id
ON CONFLICT DO NOTHING

-- name: add_sources
-- The sources come as one JSON text that a worker has written: a thousand models may have 32 each.
INSERT INTO model_sources (model_id, source_type_id, url, source_metadata, updated)
SELECT s.model_id, s.source_type_id, s.url, s.metadata, now()
FROM json_to_recordset($1::text::json) AS s (
    model_id uuid, source_type_id int, url text, metadata jsonb
)
WHERE NOT EXISTS (
    SELECT FROM model_sources AS o
    WHERE o.model_id = s.model_id AND o.source_type_id = s.source_type_id AND o.url = s.url
)

-- name: known
-- What the claim needs to know of these models ($1), and of those that have one of these hashes ($2)
-- under another id.
SELECT
    m.model_id, m.name, m.quantization_id, m.model_hash,
    coalesce(m.active_parameter_count_b, m.parameter_count_b) AS parameters_b
FROM models AS m WHERE m.model_id = any($1::uuid []) OR m.model_hash = any($2::text [])

-- name: raise_need
-- An `oom` of a runner ($2): the model of the run ($1), or its judge when that needs more, needs more
-- VRAM than the runner has. Never more than twice the rule: beyond that the machine is at fault, and one
-- machine must not keep a model from all others. The run's model is read from its row, which stays.
WITH failed AS (
    SELECT
        v.model_id, v.rule_gb,
        least((r.capabilities ->> 'vram_gb')::int, (k.capability_caps ->> 'vram_gb')::int) AS had_gb
    FROM run_queue AS q
    INNER JOIN runners AS r ON r.runner_id = $2
    INNER JOIN runner_keys AS k ON r.key_fingerprint = k.fingerprint
    CROSS JOIN LATERAL (
        SELECT * FROM model_vram
        WHERE model_id IN (q.model_id, q.judge_model_id)
        ORDER BY need_gb DESC, model_id = q.model_id DESC LIMIT 1
    ) AS v
    WHERE q.run_id = $1 AND q.job IS NOT NULL
),

raised AS (
    INSERT INTO learned_needs AS l (model_id, need_gb, run_id, learned_at)
    SELECT model_id, had_gb + 1, $1, clock_timestamp() FROM failed
    WHERE had_gb >= rule_gb AND had_gb < 2 * rule_gb
    ON CONFLICT (model_id) DO UPDATE SET
        need_gb = excluded.need_gb, run_id = excluded.run_id, learned_at = excluded.learned_at
    WHERE l.need_gb < excluded.need_gb
    RETURNING model_id, need_gb
),

audited AS (
    INSERT INTO audit (actor, action, target, run_id, runner_id, detail)
    SELECT
        'system', 'model.need.raise', 'model:' || model_id, $1, $2,
        jsonb_build_object('need_gb', need_gb)
    FROM raised
)

SELECT model_id, need_gb FROM raised

-- name: lower_need
-- A result with a measured peak ($2, in MB) was accepted: what was learned of the run's model and judge
-- ($1) was too much.
UPDATE learned_needs AS l SET
    need_gb = ceil($2::int / 1024.0), run_id = $1, learned_at = clock_timestamp()
FROM run_queue AS q
WHERE
    q.run_id = $1 AND q.job IS NOT NULL AND l.model_id IN (q.model_id, q.judge_model_id)
    AND l.need_gb > ceil($2::int / 1024.0)

-- name: learned
-- The models of which more than the rule was learned.
SELECT model_id, name, quantization, rule_gb, need_gb, learned_from, learned_at
FROM model_vram
WHERE learned_from IS NOT NULL
ORDER BY name, quantization, model_id

-- name: forget_need
-- The rule counts again; parked claims look at once. Sent again, it finds nothing to forget.
WITH forgotten AS (
    DELETE FROM learned_needs WHERE model_id = $1
    RETURNING need_gb
)

SELECT f.need_gb, pg_notify('bakeoff_queue', '')
FROM models AS m LEFT JOIN forgotten AS f ON true
WHERE m.model_id = $1

-- name: named
-- The models of this name or model_id.
SELECT model_id FROM models WHERE name = $1 OR model_id::text = $1 ORDER BY model_id
