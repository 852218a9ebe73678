-- migrate:up

-- The tables of bakeoff's relational schema, exactly as upstream creates them: types, nullability,
-- defaults, CHECKs, cascades, indexes, and the rows that it seeds. On a database that bakeoff made,
-- only what its version did not know yet is added; no row is touched.

-- Until 25 May 2026 bakeoff numbered its models; since then their ids are UUIDs. Nothing here could
-- tell which model such a number is, so the database is refused before anything is changed.
DO $$
DECLARE
    odd record;
BEGIN
    SELECT c.table_name, c.column_name, c.data_type, k.wanted INTO odd
    FROM information_schema.columns AS c
    INNER JOIN (VALUES
        ('creators', 'creator_id', 'uuid'), ('models', 'model_id', 'uuid'),
        ('model_sources', 'model_id', 'uuid'), ('tasks', 'task_id', 'integer'),
        ('prompts', 'prompt_id', 'integer'), ('runners', 'runner_id', 'text'),
        ('runs', 'run_id', 'uuid'), ('run_queue', 'queue_id', 'uuid'),
        ('run_queue', 'prompt_id', 'integer'), ('run_model_metrics', 'model_id', 'uuid'),
        ('run_hardware_metrics', 'run_id', 'uuid'), ('agent_traces', 'trace_id', 'uuid')
    ) AS k (table_name, column_name, wanted)
        ON c.table_name = k.table_name AND c.column_name = k.column_name
    WHERE c.table_schema = current_schema() AND c.data_type <> k.wanted
    ORDER BY c.table_name = 'models' DESC LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'this database cannot be adopted: its %.% is %, where bakeoff has % since '
            '25 May 2026. Nothing was changed: give the queue a database of its own, or move this '
            'one to bakeoff''s newer schema first', odd.table_name, odd.column_name, odd.data_type,
            odd.wanted;
    END IF;
END $$;

CREATE TABLE IF NOT EXISTS source_types (
    source_type_id serial PRIMARY KEY,
    name text NOT NULL UNIQUE
);

CREATE TABLE IF NOT EXISTS quantization_methods (
    quantization_id serial PRIMARY KEY,
    name text NOT NULL UNIQUE,
    vram_multiplier numeric NOT NULL, -- bytes per active parameter
    description text
);

CREATE TABLE IF NOT EXISTS model_architectures (
    architecture_id serial PRIMARY KEY,
    name text NOT NULL UNIQUE,
    description text
);

CREATE TABLE IF NOT EXISTS model_file_formats (
    file_format_id serial PRIMARY KEY,
    name text NOT NULL UNIQUE,
    description text
);

CREATE TABLE IF NOT EXISTS creators (
    creator_id uuid PRIMARY KEY,
    name text NOT NULL,
    display_name text,
    homepage text,
    service_identifiers jsonb,
    provisional boolean NOT NULL DEFAULT false
);

CREATE TABLE IF NOT EXISTS models (
    model_id uuid PRIMARY KEY,
    name text NOT NULL,
    creator_id uuid REFERENCES creators,
    model_hash text UNIQUE, -- SHA-256 of the weights
    parameter_count_b double precision,
    active_parameter_count_b double precision,
    architecture_id int REFERENCES model_architectures,
    context_length_default int,
    context_length_min int,
    context_length_max int,
    file_format_id int REFERENCES model_file_formats,
    quantization_id int REFERENCES quantization_methods,
    model_source_mtime timestamptz,
    model_source_size bigint,
    release_date date,
    version text,
    description text,
    predecessor_model_id uuid REFERENCES models,
    provisional boolean NOT NULL DEFAULT false
);

CREATE TABLE IF NOT EXISTS model_sources (
    source_id serial PRIMARY KEY,
    model_id uuid NOT NULL REFERENCES models,
    source_type_id int NOT NULL REFERENCES source_types,
    url text NOT NULL,
    source_metadata jsonb,
    updated timestamptz
);

CREATE TABLE IF NOT EXISTS task_categories (
    category_id serial PRIMARY KEY,
    name text NOT NULL UNIQUE,
    description text
);

CREATE TABLE IF NOT EXISTS tasks (
    task_id serial PRIMARY KEY,
    name text NOT NULL,
    category_id int REFERENCES task_categories,
    parent_id int REFERENCES tasks,
    sort_order int NOT NULL DEFAULT 0,
    description text,
    grader_script text,
    grader_script_commit text,
    natural_key_hash text NOT NULL UNIQUE
);
ALTER TABLE tasks ADD COLUMN IF NOT EXISTS uplift_baseline_task_id int REFERENCES tasks;

CREATE TABLE IF NOT EXISTS prompts (
    prompt_id serial PRIMARY KEY,
    task_id int NOT NULL REFERENCES tasks,
    file_path text NOT NULL,
    git_commit_hash text NOT NULL,
    content_sha256 text UNIQUE,
    content_length_bytes int,
    version text,
    release_date date,
    is_prerelease boolean NOT NULL DEFAULT false,
    difficulty int NOT NULL DEFAULT 0,
    modified_at timestamptz
);

CREATE TABLE IF NOT EXISTS runners (
    runner_id text PRIMARY KEY,
    public_key text NOT NULL, -- base64
    hostname text,
    process_id int,
    effective_user text,
    last_heartbeat timestamptz,
    status text NOT NULL DEFAULT 'ACTIVE' CHECK (status IN ('ACTIVE', 'IDLE', 'DEAD')),
    registered_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    description text
);

CREATE TABLE IF NOT EXISTS runs (
    run_id uuid PRIMARY KEY,
    submitted_at timestamptz NOT NULL,
    publisher_id text NOT NULL,
    runner_version text,
    prompt_git_hash text,
    runner_id text REFERENCES runners -- null: a standalone run
);
ALTER TABLE runs ADD COLUMN IF NOT EXISTS run_status text
CHECK (run_status IN ('complete', 'incomplete', 'failed'));

CREATE TABLE IF NOT EXISTS run_queue (
    queue_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    run_id uuid NOT NULL REFERENCES runs ON DELETE CASCADE,
    prompt_id int NOT NULL REFERENCES prompts,
    priority int NOT NULL DEFAULT 100, -- lower first
    status text NOT NULL DEFAULT 'PENDING' CHECK (
        status IN ('PENDING', 'CLAIMED', 'IN_PROGRESS', 'COMPLETE', 'FAILED', 'CANCELLED')
    ),
    attempt_count int NOT NULL DEFAULT 0,
    max_attempts int NOT NULL DEFAULT 5,
    claimed_by text,
    claimed_at timestamptz,
    started_at timestamptz,
    completed_at timestamptz,
    error_detail text,
    retry_after timestamptz,
    source_file text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS run_queue_claim_idx ON run_queue (priority, created_at)
WHERE status = 'PENDING';

CREATE TABLE IF NOT EXISTS run_model_metrics (
    run_id uuid NOT NULL REFERENCES runs,
    prompt_id int NOT NULL REFERENCES prompts,
    model_id uuid NOT NULL REFERENCES models,
    score double precision, -- null: the cell failed
    pass_fail boolean,
    failure_reason text,
    gflops_per_token double precision,
    PRIMARY KEY (run_id, prompt_id, model_id)
);
ALTER TABLE run_model_metrics ADD COLUMN IF NOT EXISTS failure_detail text;

CREATE TABLE IF NOT EXISTS agent_traces (
    trace_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    run_id uuid NOT NULL REFERENCES runs ON DELETE CASCADE,
    prompt_id int NOT NULL REFERENCES prompts,
    model_id uuid NOT NULL REFERENCES models,
    step_index int NOT NULL,
    action_type text NOT NULL,
    action_payload text,
    observation text,
    boundary_violated boolean NOT NULL DEFAULT false,
    cost_tokens int,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (run_id, prompt_id, model_id, step_index)
);
ALTER TABLE run_model_metrics ADD COLUMN IF NOT EXISTS trace_id uuid REFERENCES agent_traces;

CREATE TABLE IF NOT EXISTS interface_type (
    interface_type_id serial PRIMARY KEY,
    name text NOT NULL UNIQUE
);

CREATE TABLE IF NOT EXISTS system_hardware (
    system_hardware_id serial PRIMARY KEY,
    cpu_model text,
    cpu_cores int,
    cpu_threads int,
    ram_gb double precision,
    motherboard text
);

CREATE TABLE IF NOT EXISTS system_software (
    system_software_id serial PRIMARY KEY,
    os_name text,
    os_version text,
    driver_version text,
    runtime_version text
);

CREATE TABLE IF NOT EXISTS gpu_hardware (
    gpu_hardware_id serial PRIMARY KEY,
    gpu_model text NOT NULL,
    vram_mb int,
    interface_type_id int REFERENCES interface_type,
    tflops_fp16 double precision,
    tflops_fp32 double precision,
    tflops_bf16 double precision
);

CREATE TABLE IF NOT EXISTS system_gpu_link (
    system_hardware_id int NOT NULL REFERENCES system_hardware,
    gpu_hardware_id int NOT NULL REFERENCES gpu_hardware,
    slot_index int NOT NULL DEFAULT 0,
    PRIMARY KEY (system_hardware_id, gpu_hardware_id, slot_index)
);

CREATE TABLE IF NOT EXISTS run_hardware_metrics (
    run_id uuid PRIMARY KEY REFERENCES runs,
    system_hardware_id int REFERENCES system_hardware,
    system_software_id int REFERENCES system_software,
    gpu_hardware_id int REFERENCES gpu_hardware,
    peak_vram_mb int,
    power_limit_w double precision,
    measured_tflops double precision
);

-- bakeoff's own bookkeeping of its schema.
CREATE TABLE IF NOT EXISTS schema_versions (
    schema_version_id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    description text,
    allow_migration boolean NOT NULL DEFAULT false,
    schema_migration_script text,
    record_migration_script text,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE IF NOT EXISTS schema_tables (
    table_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    table_name text NOT NULL,
    uuid_namespace uuid NOT NULL,
    initial_version_id int NOT NULL REFERENCES schema_versions,
    current_version_id int NOT NULL REFERENCES schema_versions,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deprecated_at timestamptz,
    UNIQUE (table_name, uuid_namespace)
);

CREATE TABLE IF NOT EXISTS schema_tables_join (
    src_table uuid NOT NULL REFERENCES schema_tables,
    dst_table uuid NOT NULL REFERENCES schema_tables,
    migrate_using int NOT NULL REFERENCES schema_versions,
    PRIMARY KEY (src_table, dst_table),
    CHECK (src_table <> dst_table)
);

INSERT INTO schema_versions (description)
SELECT
    'C4+C6 schema: agent_traces table, tasks.uplift_baseline_task_id, '
    || 'run_model_metrics.trace_id, cyber_safety category'
WHERE NOT EXISTS (SELECT FROM schema_versions);

INSERT INTO source_types (name) VALUES
('huggingface'), ('ollama'), ('direct_url'), ('local_file')
ON CONFLICT DO NOTHING;

INSERT INTO model_architectures (name, description) VALUES
('Dense', 'Standard transformer with all parameters active per token'),
('MoE', 'Mixture of Experts — subset of parameters active per token'),
('SSM', 'State Space Model (e.g. Mamba)'),
('Hybrid', 'Mixed architecture combining MoE and Dense layers')
ON CONFLICT DO NOTHING;

INSERT INTO model_file_formats (name, description) VALUES
('GGUF', 'GGUF format — llama.cpp native, self-contained'),
('SafeTensors', 'HuggingFace SafeTensors format'),
('PyTorch', 'PyTorch .pt / .pth checkpoint'),
('ONNX', 'Open Neural Network Exchange format'),
('ExLlamaV2', 'ExLlamaV2 quantized format'),
('MLX', 'Apple MLX framework format')
ON CONFLICT DO NOTHING;

INSERT INTO task_categories (name, description) VALUES
('dumb_model', 'Minimal-capability floor suite: deterministic scorers only.'),
(
    'cyber_safety',
    'Cyber capability proxy tests: injection resistance, refusal quality, dual-use code '
    || 'generation, agentic containment, exfiltration-via-reasoning, non-expert uplift.'
)
ON CONFLICT DO NOTHING;

INSERT INTO quantization_methods (name, vram_multiplier, description) VALUES
('fp32', 4.000, 'IEEE 754 single precision — 4 bytes/weight'),
('fp16', 2.000, 'IEEE 754 half precision — 2 bytes/weight'),
('bf16', 2.000, 'Brain float 16 — 2 bytes/weight'),
('q8_0', 1.063, 'GGUF Q8_0 — 8 bits + 2-byte scale per 32-weight block'),
('q6_k', 0.820, 'GGUF Q6_K — 6 bits/weight with K-quant super-blocks'),
('q5_k_m', 0.684, 'GGUF Q5_K_M — 5-bit K-quant medium'),
('q5_k_s', 0.664, 'GGUF Q5_K_S — 5-bit K-quant small'),
('q5_0', 0.688, 'GGUF Q5_0 — 5 bits + 2-byte scale per 32-weight block'),
('q5_1', 0.750, 'GGUF Q5_1 — 5 bits + 4-byte scale+min per 32-weight block'),
('q4_k_m', 0.563, 'GGUF Q4_K_M — 4-bit K-quant medium (recommended general use)'),
('q4_k_s', 0.545, 'GGUF Q4_K_S — 4-bit K-quant small'),
('q4_0', 0.563, 'GGUF Q4_0 — 4 bits + 2-byte scale per 32-weight block'),
('q4_1', 0.625, 'GGUF Q4_1 — 4 bits + 4-byte scale+min per 32-weight block'),
('q3_k_l', 0.461, 'GGUF Q3_K_L — 3-bit K-quant large'),
('q3_k_m', 0.465, 'GGUF Q3_K_M — 3-bit K-quant medium'),
('q3_k_s', 0.410, 'GGUF Q3_K_S — 3-bit K-quant small'),
('q2_k', 0.352, 'GGUF Q2_K — 2-bit K-quant'),
('iq4_xs', 0.534, 'GGUF IQ4_XS — 4-bit imatrix extra-small'),
('iq4_nl', 0.563, 'GGUF IQ4_NL — 4-bit imatrix non-linear'),
('iq3_m', 0.441, 'GGUF IQ3_M — 3-bit imatrix medium'),
('iq3_s', 0.394, 'GGUF IQ3_S — 3-bit imatrix small'),
('iq3_xxs', 0.328, 'GGUF IQ3_XXS — 3-bit imatrix extra-extra-small'),
('iq2_m', 0.289, 'GGUF IQ2_M — 2-bit imatrix medium'),
('iq2_xs', 0.274, 'GGUF IQ2_XS — 2-bit imatrix extra-small'),
('iq2_xxs', 0.266, 'GGUF IQ2_XXS — 2-bit imatrix extra-extra-small'),
('iq1_m', 0.219, 'GGUF IQ1_M — 1-bit imatrix medium'),
('iq1_s', 0.188, 'GGUF IQ1_S — 1-bit imatrix small')
ON CONFLICT DO NOTHING;

INSERT INTO interface_type (name) VALUES
('PCIe 3.0 x16'),
('PCIe 4.0 x16'),
('PCIe 5.0 x16'),
('NVLink 3'),
('NVLink 4'),
('Thunderbolt 3'),
('Thunderbolt 4'),
('USB4'),
('eGPU'),
('integrated')
ON CONFLICT DO NOTHING;

-- migrate:down

-- The tables may be bakeoff's own, with its rows: going back leaves them where they are.
SELECT 1;
