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
INSERT INTO creators (creator_id, name, display_name, homepage, provisional)
SELECT * FROM unnest($1::uuid [], $2::text [], $3::text [], $4::text [], $5::bool [])
ON CONFLICT DO NOTHING

-- name: add
-- Get-or-create: what is known of a model is not overwritten by a later descriptor.
INSERT INTO models (
    model_id, name, creator_id, model_hash, parameter_count_b, active_parameter_count_b,
    architecture_id, context_length_default, context_length_min, context_length_max,
    file_format_id, quantization_id, model_source_size, release_date, version, description,
    provisional
)
SELECT * FROM unnest(
    $1::uuid [], $2::text [], $3::uuid [], $4::text [], $5::float8 [], $6::float8 [],
    $7::int [], $8::int [], $9::int [], $10::int [],
    $11::int [], $12::int [], $13::bigint [], $14::date [], $15::text [], $16::text [],
    $17::bool []
)
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
-- What the claim needs to know of these models.
SELECT
    m.model_id, m.name, m.quantization_id,
    coalesce(m.active_parameter_count_b, m.parameter_count_b) AS parameters_b
FROM models AS m WHERE m.model_id = any($1::uuid [])
