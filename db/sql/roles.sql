-- name: make
-- The three roles, without a login: people and services get logins that are members.
DO $$
DECLARE name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'bakeoff_queue_owner', 'bakeoff_queue_service', 'bakeoff_queue_reader'
    ] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN', name);
        END IF;
    END LOOP;
END $$

-- name: are_made
-- Whether this database has been given to the owner's role.
SELECT tableowner = 'bakeoff_queue_owner' FROM pg_tables
WHERE schemaname = current_schema() AND tablename = 'run_queue'

-- name: give
-- To the owner's role: the tables, views, sequences and functions of whoever owns the queue, or is
-- running this, such as the tables of a later migration. Whoever owned them goes on as before, as a
-- member of that role.
DO $$
DECLARE
    givers oid[] = ARRAY(
        SELECT relowner FROM pg_class WHERE oid = 'run_queue'::regclass
        UNION
        SELECT oid FROM pg_roles WHERE rolname = current_user
    );
    each record;
BEGIN
    IF NOT has_schema_privilege('bakeoff_queue_owner', current_schema(), 'CREATE') THEN
        EXECUTE format('GRANT USAGE, CREATE ON SCHEMA %I TO bakeoff_queue_owner', current_schema());
    END IF;
    FOR each IN
        SELECT rolname AS name FROM pg_roles
        WHERE oid = any(givers) AND NOT pg_has_role(oid, 'bakeoff_queue_owner', 'MEMBER')
    LOOP
        EXECUTE format('GRANT bakeoff_queue_owner TO %I', each.name);
    END LOOP;
    FOR each IN
        SELECT
            CASE relkind WHEN 'v' THEN 'VIEW' WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END AS kind,
            oid::regclass::text AS name
        FROM pg_class AS c
        WHERE
            relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'v', 'S')
            AND relowner = any(givers) AND pg_get_userbyid(relowner) <> 'bakeoff_queue_owner'
            -- A column's own sequence follows its table.
            AND NOT EXISTS (
                SELECT FROM pg_depend AS d
                WHERE
                    d.classid = 'pg_class'::regclass AND d.objid = c.oid
                    AND d.deptype IN ('a', 'i') AND d.refobjsubid > 0
            )
        UNION ALL
        SELECT 'ROUTINE', oid::regprocedure::text
        FROM pg_proc
        WHERE
            pronamespace = current_schema()::regnamespace AND proowner = any(givers)
            AND pg_get_userbyid(proowner) <> 'bakeoff_queue_owner'
    LOOP
        EXECUTE format('ALTER %s %s OWNER TO bakeoff_queue_owner', each.kind, each.name);
    END LOOP;
END $$

-- name: grant
-- What the service may do: read and write rows, delete only what it archives and forgets, and change
-- nothing of the trail, its chain and the bundles that were accepted. Readers see no secret: not the
-- lease_id of a live lease, and no table of tokens.
DO $$
DECLARE
    forgotten text[] = ARRAY[
        'run_queue', 'attempts', 'run_archive', 'attempts_archive', 'run_archive_changes',
        'submission_refusals', 'idempotency_keys', 'registration_nonces', 'revoked_tokens',
        'audit_unchained', 'run_deferrals', 'learned_needs', 'ring_keys', 'queue_pauses'
    ];
    only_added text[] = ARRAY['audit', 'audit_chain', 'submission_files'];
    hidden text[] = ARRAY[
        'admin_tokens', 'registration_nonces', 'revoked_tokens', 'idempotency_keys', 'every_run',
        'every_attempt', 'ring_keys'
    ];
    secret text[] = ARRAY['lease_id', 'claim_key', 'claim_digest'];
    each record;
BEGIN
    EXECUTE format(
        'GRANT USAGE ON SCHEMA %I TO bakeoff_queue_service, bakeoff_queue_reader', current_schema()
    );
    FOR each IN
        SELECT
            c.oid::regclass::text AS name, c.relname::text AS bare, c.relkind = 'S' AS is_sequence,
            c.relkind = 'v' OR c.relname = 'schema_migrations' AS only_read,
            (
                SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum)
                FROM pg_attribute AS a
                WHERE
                    a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                    AND a.attname <> all(secret)
            ) AS told
        FROM pg_class AS c
        WHERE
            c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p', 'v', 'S')
            AND pg_get_userbyid(c.relowner) = 'bakeoff_queue_owner'
    LOOP
        EXECUTE format(
            'REVOKE ALL ON %s FROM bakeoff_queue_service, bakeoff_queue_reader', each.name
        );
        IF each.is_sequence THEN
            EXECUTE format('GRANT USAGE ON SEQUENCE %s TO bakeoff_queue_service', each.name);
            CONTINUE;
        END IF;
        EXECUTE format(
            'GRANT %s ON %s TO bakeoff_queue_service',
            CASE
                WHEN each.only_read THEN 'SELECT'
                WHEN each.bare = any(only_added) THEN 'SELECT, INSERT'
                WHEN each.bare = any(forgotten) THEN 'SELECT, INSERT, UPDATE, DELETE'
                ELSE 'SELECT, INSERT, UPDATE'
            END,
            each.name
        );
        IF each.bare <> all(hidden) THEN
            EXECUTE format(
                'GRANT SELECT (%s) ON %s TO bakeoff_queue_reader', each.told, each.name
            );
        END IF;
    END LOOP;
END $$

-- name: can_change_the_audit
SELECT
    has_table_privilege('audit', 'UPDATE') OR has_table_privilege('audit', 'DELETE')
    OR has_table_privilege('audit', 'TRUNCATE')
