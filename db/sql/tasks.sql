-- name: add_tasks
-- Get-or-create by natural key; floor tasks are of upstream's category dumb_model. Here and below the
-- rows come as one JSON text that a worker has written: to encode thousands of rows in the server
-- would hold its event loop.
INSERT INTO tasks (name, category_id, description, natural_key_hash)
SELECT t.name, c.category_id, t.description, t.natural_key_hash
FROM json_to_recordset($1::text::json) AS t (
    name text, category text, description text, natural_key_hash text
)
LEFT JOIN task_categories AS c ON t.category = c.name
ON CONFLICT (natural_key_hash) DO NOTHING

-- name: add_prompts
-- One row per (task, prompt variant), found again by the digest over both texts.
INSERT INTO prompts (
    task_id, file_path, git_commit_hash, content_sha256, content_length_bytes, version
)
SELECT t.task_id, p.file_path, '', p.content_sha256, p.content_length_bytes, '1'
FROM json_to_recordset($1::text::json) AS p (
    task_key text, file_path text, content_sha256 text, content_length_bytes int
)
INNER JOIN tasks AS t ON p.task_key = t.natural_key_hash
ON CONFLICT (content_sha256) DO NOTHING
