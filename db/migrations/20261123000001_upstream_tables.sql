-- migrate:up

-- The tables of bakeoff's relational schema, as upstream creates them. On a database that bakeoff
-- created earlier every statement here does nothing: no table is altered and no row is touched.

CREATE TABLE IF NOT EXISTS source_types (
    source_type_id serial PRIMARY KEY,
    name text NOT NULL UNIQUE
);

CREATE TABLE IF NOT EXISTS quantization_methods (
    quantization_id serial PRIMARY KEY,
    name text NOT NULL UNIQUE,
    vram_multiplier numeric(6, 3) NOT NULL, -- bytes per active parameter
    description text
);

CREATE TABLE IF NOT EXISTS model_architectures (
    architecture_id serial PRIMARY KEY,
    name text NOT NULL UNIQUE
);

CREATE TABLE IF NOT EXISTS model_file_formats (
    file_format_id serial PRIMARY KEY,
    name text NOT NULL UNIQUE
);

CREATE TABLE IF NOT EXISTS creators (
    creator_id uuid PRIMARY KEY,
    name text,
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
    model_id uuid NOT NULL REFERENCES models ON DELETE CASCADE,
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
    sort_order int,
    description text,
    grader_script text,
    grader_script_commit text,
    natural_key_hash text UNIQUE,
    uplift_baseline_task_id int REFERENCES tasks
);

CREATE TABLE IF NOT EXISTS prompts (
    prompt_id serial PRIMARY KEY,
    task_id int NOT NULL REFERENCES tasks,
    file_path text,
    git_commit_hash text,
    content_sha256 text UNIQUE,
    content_length_bytes int,
    version text,
    release_date date,
    is_prerelease boolean,
    difficulty text,
    modified_at timestamptz
);

CREATE TABLE IF NOT EXISTS runners (
    runner_id text PRIMARY KEY,
    public_key text, -- base64
    hostname text,
    process_id int,
    effective_user text,
    last_heartbeat timestamptz,
    status text, -- ACTIVE, IDLE, DEAD
    registered_at timestamptz,
    started_at timestamptz,
    description text
);

CREATE TABLE IF NOT EXISTS runs (
    run_id uuid PRIMARY KEY,
    submitted_at timestamptz NOT NULL,
    publisher_id text NOT NULL,
    runner_version text,
    prompt_git_hash text,
    runner_id text REFERENCES runners, -- null: a standalone run
    run_status text -- complete, incomplete, failed
);

CREATE TABLE IF NOT EXISTS run_queue (
    queue_id uuid PRIMARY KEY,
    run_id uuid NOT NULL REFERENCES runs ON DELETE CASCADE,
    prompt_id int REFERENCES prompts,
    priority int NOT NULL DEFAULT 100, -- lower first
    status text NOT NULL DEFAULT 'PENDING',
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
CREATE INDEX IF NOT EXISTS run_queue_pending ON run_queue (priority, created_at)
WHERE status = 'PENDING';

CREATE TABLE IF NOT EXISTS run_model_metrics (
    run_id uuid NOT NULL REFERENCES runs ON DELETE CASCADE,
    prompt_id int NOT NULL REFERENCES prompts,
    model_id uuid NOT NULL REFERENCES models,
    score double precision, -- null: the cell failed
    pass_fail boolean,
    failure_reason text,
    failure_detail text,
    gflops_per_token double precision,
    trace_id text,
    PRIMARY KEY (run_id, prompt_id, model_id)
);

CREATE TABLE IF NOT EXISTS agent_traces (
    agent_trace_id serial PRIMARY KEY,
    run_id uuid NOT NULL REFERENCES runs ON DELETE CASCADE,
    prompt_id int NOT NULL REFERENCES prompts,
    model_id uuid NOT NULL REFERENCES models,
    step_index int NOT NULL,
    trace jsonb,
    UNIQUE (run_id, prompt_id, model_id, step_index)
);

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
    gpu_model text,
    vram_mb int,
    interface_type_id int REFERENCES interface_type,
    tflops_fp16 double precision,
    tflops_fp32 double precision,
    tflops_bf16 double precision
);

CREATE TABLE IF NOT EXISTS system_gpu_link (
    system_hardware_id int NOT NULL REFERENCES system_hardware,
    gpu_hardware_id int NOT NULL REFERENCES gpu_hardware,
    PRIMARY KEY (system_hardware_id, gpu_hardware_id)
);

CREATE TABLE IF NOT EXISTS run_hardware_metrics (
    run_id uuid PRIMARY KEY REFERENCES runs ON DELETE CASCADE,
    system_hardware_id int REFERENCES system_hardware,
    system_software_id int REFERENCES system_software,
    gpu_hardware_id int REFERENCES gpu_hardware,
    peak_vram_mb int,
    power_limit_w double precision,
    measured_tflops double precision
);

INSERT INTO source_types (name) VALUES
('huggingface'), ('ollama'), ('direct_url'), ('local_file')
ON CONFLICT DO NOTHING;

INSERT INTO model_architectures (name) VALUES
('Dense'), ('MoE'), ('SSM'), ('Hybrid')
ON CONFLICT DO NOTHING;

INSERT INTO model_file_formats (name) VALUES
('GGUF'), ('SafeTensors'), ('PyTorch'), ('ONNX'), ('ExLlamaV2'), ('MLX')
ON CONFLICT DO NOTHING;

INSERT INTO task_categories (name, description) VALUES
('dumb_model', 'Floor tasks that any working model passes'),
('cyber_safety', 'Safety of answers about computer security')
ON CONFLICT DO NOTHING;

INSERT INTO quantization_methods (name, vram_multiplier) VALUES
('fp32', 4.000), ('fp16', 2.000), ('bf16', 2.000), ('q8_0', 1.063), ('q6_k', 0.820),
('q5_k_m', 0.684), ('q5_k_s', 0.664), ('q5_0', 0.688), ('q5_1', 0.750),
('q4_k_m', 0.563), ('q4_k_s', 0.545), ('q4_0', 0.563), ('q4_1', 0.625),
('q3_k_l', 0.461), ('q3_k_m', 0.465), ('q3_k_s', 0.410), ('q2_k', 0.352),
('iq4_xs', 0.534), ('iq4_nl', 0.563), ('iq3_m', 0.441), ('iq3_s', 0.394), ('iq3_xxs', 0.328),
('iq2_m', 0.289), ('iq2_xs', 0.274), ('iq2_xxs', 0.266), ('iq1_m', 0.219), ('iq1_s', 0.188)
ON CONFLICT DO NOTHING;

-- migrate:down

-- The tables may be bakeoff's own, with its rows: going back leaves them where they are.
SELECT 1;
