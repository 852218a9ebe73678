-- name: add_model_metrics
-- A second writer never overwrites: the run's rows are written once, by the submit that won.
-- The cells come as one JSON text that a worker has written: to encode thousands of rows here would
-- hold the event loop.
INSERT INTO run_model_metrics (
    run_id, prompt_id, model_id, score, pass_fail, failure_reason, failure_detail, gflops_per_token
)
SELECT
    $1, p.prompt_id, $2, t.score, t.pass_fail, t.failure_reason, t.failure_detail,
    t.gflops_per_token
FROM json_to_recordset($3::text::json) AS t (
    content_sha256 text, score float8, pass_fail bool, failure_reason text, failure_detail text,
    gflops_per_token float8
)
INNER JOIN prompts AS p ON t.content_sha256 = p.content_sha256

-- name: lock_hardware
-- Upstream's hardware tables have no unique keys, and an adopted database may hold doubles: get-or-
-- create is made safe by one lock, held for the few statements until the commit. A row is found
-- again when all that a result says is the same, and never changed: what one runner says of its card
-- is not told of another's.
SELECT pg_advisory_xact_lock(hashtext('bakeoff_queue.hardware'))

-- name: get_or_add_system_hardware
WITH wanted (cpu_model, cpu_cores, cpu_threads, ram_gb) AS (
    VALUES ($1::text, $2::int, $3::int, $4::float8)
),

found AS (
    SELECT h.system_hardware_id FROM system_hardware AS h, wanted AS w
    WHERE
        h.cpu_model IS NOT DISTINCT FROM w.cpu_model
        AND h.cpu_cores IS NOT DISTINCT FROM w.cpu_cores
        AND h.cpu_threads IS NOT DISTINCT FROM w.cpu_threads
        AND h.ram_gb IS NOT DISTINCT FROM w.ram_gb
    ORDER BY 1 LIMIT 1
),

added AS (
    INSERT INTO system_hardware (cpu_model, cpu_cores, cpu_threads, ram_gb)
    SELECT * FROM wanted WHERE NOT EXISTS (SELECT FROM found)
    RETURNING system_hardware_id
)

SELECT * FROM found UNION ALL SELECT * FROM added

-- name: get_or_add_system_software
WITH wanted (os_name, os_version, driver_version, runtime_version) AS (
    VALUES ($1::text, $2::text, $3::text, $4::text)
),

found AS (
    SELECT s.system_software_id FROM system_software AS s, wanted AS w
    WHERE
        s.os_name IS NOT DISTINCT FROM w.os_name
        AND s.os_version IS NOT DISTINCT FROM w.os_version
        AND s.driver_version IS NOT DISTINCT FROM w.driver_version
        AND s.runtime_version IS NOT DISTINCT FROM w.runtime_version
    ORDER BY 1 LIMIT 1
),

added AS (
    INSERT INTO system_software (os_name, os_version, driver_version, runtime_version)
    SELECT * FROM wanted WHERE NOT EXISTS (SELECT FROM found)
    RETURNING system_software_id
)

SELECT * FROM found UNION ALL SELECT * FROM added

-- name: get_or_add_gpu_hardware
WITH wanted (gpu_model, vram_mb, tflops_fp16) AS (VALUES ($1::text, $2::int, $3::float8)),

found AS (
    SELECT g.gpu_hardware_id FROM gpu_hardware AS g, wanted AS w
    WHERE
        g.gpu_model IS NOT DISTINCT FROM w.gpu_model
        AND g.vram_mb IS NOT DISTINCT FROM w.vram_mb
        AND g.tflops_fp16 IS NOT DISTINCT FROM w.tflops_fp16
    ORDER BY 1 LIMIT 1
),

added AS (
    INSERT INTO gpu_hardware (gpu_model, vram_mb, tflops_fp16)
    SELECT * FROM wanted WHERE NOT EXISTS (SELECT FROM found)
    RETURNING gpu_hardware_id
)

SELECT * FROM found UNION ALL SELECT * FROM added

-- name: link_gpu
INSERT INTO system_gpu_link (system_hardware_id, gpu_hardware_id) VALUES ($1, $2)
ON CONFLICT DO NOTHING

-- name: add_hardware_metrics
INSERT INTO run_hardware_metrics (
    run_id, system_hardware_id, system_software_id, gpu_hardware_id, peak_vram_mb, power_limit_w,
    measured_tflops
) VALUES ($1, $2, $3, $4, $5, $6, $7)

-- name: model_metrics_of
-- One page of the cells of a result, each with the digest of its texts, after the cursor ($2). A
-- result is of one model, so a prompt names the row.
SELECT
    c.prompt_id, p.content_sha256, c.score, c.pass_fail, c.failure_reason, c.failure_detail,
    c.gflops_per_token
FROM run_model_metrics AS c
INNER JOIN prompts AS p ON c.prompt_id = p.prompt_id
WHERE c.run_id = $1 AND ($2::int IS NULL OR c.prompt_id > $2)
ORDER BY c.prompt_id
LIMIT $3

-- name: hardware_metrics_of
SELECT
    g.gpu_model, g.vram_mb, g.tflops_fp16, h.power_limit_w, s.cpu_model, s.cpu_cores,
    s.cpu_threads, s.ram_gb, o.os_name, o.os_version, o.driver_version, o.runtime_version,
    h.peak_vram_mb, h.measured_tflops
FROM run_hardware_metrics AS h
LEFT JOIN system_hardware AS s ON h.system_hardware_id = s.system_hardware_id
LEFT JOIN system_software AS o ON h.system_software_id = o.system_software_id
LEFT JOIN gpu_hardware AS g ON h.gpu_hardware_id = g.gpu_hardware_id
WHERE h.run_id = $1

-- name: run_of
SELECT run_status, publisher_id, runner_id, submitted_at, runner_version, prompt_git_hash
FROM runs WHERE run_id = $1
