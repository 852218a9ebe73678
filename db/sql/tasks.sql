-- name: add_tasks
-- Get-or-create by natural key; floor tasks are of upstream's category dumb_model.
INSERT INTO tasks (name, category_id, description, natural_key_hash)
SELECT t.name, c.category_id, t.description, t.natural_key_hash
FROM unnest($1::text [], $2::text [], $3::text [], $4::text [])
    AS t (name, category, description, natural_key_hash)
LEFT JOIN task_categories AS c ON t.category = c.name
ON CONFLICT (natural_key_hash) DO NOTHING

-- name: add_prompts
-- One row per (task, prompt variant), found again by the digest over both texts.
INSERT INTO prompts (
    task_id, file_path, git_commit_hash, content_sha256, content_length_bytes, version
)
SELECT t.task_id, p.file_path, '', p.content_sha256, p.content_length_bytes, '1'
FROM unnest($1::text [], $2::text [], $3::text [], $4::int [])
    AS p (natural_key_hash, file_path, content_sha256, content_length_bytes)
INNER JOIN tasks AS t ON p.natural_key_hash = t.natural_key_hash
ON CONFLICT (content_sha256) DO NOTHING
