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
