-- One schema for SQLite and PostgreSQL: TEXT, BIGINT and BYTEA only, partial indexes, checks.
-- Times are microseconds since 1970-01-01 UTC, JSON is TEXT, yes and no are 1 and 0.
-- A later migration may add; what an older binary reads or writes must stay.

-- A tenant, its share of the workers, and how many of its builds stand where. The counters of
-- the running states are one number: what runs is few and can be counted by state.
CREATE TABLE tenant (
    id TEXT NOT NULL PRIMARY KEY,
    tier TEXT NOT NULL,
    -- 1 when the operator set the tenant up; else the tier is that of its last build.
    is_set_up BIGINT NOT NULL,
    limits TEXT,
    weight BIGINT NOT NULL CHECK (weight > 0),
    running_max BIGINT NOT NULL CHECK (running_max >= 0),
    -- Work given to the tenant so far and half a build, divided by its weight: who has least is next.
    virtual_time BIGINT NOT NULL,
    queued BIGINT NOT NULL CHECK (queued >= 0),
    running BIGINT NOT NULL CHECK (running >= 0),
    completed BIGINT NOT NULL CHECK (completed >= 0),
    failed BIGINT NOT NULL CHECK (failed >= 0),
    cancelled BIGINT NOT NULL CHECK (cancelled >= 0),
    timed_out BIGINT NOT NULL CHECK (timed_out >= 0),
    storage_bytes BIGINT NOT NULL CHECK (storage_bytes >= 0),
    compute_us BIGINT NOT NULL CHECK (compute_us >= 0)
);
CREATE INDEX tenant_waiting ON tenant (virtual_time, id) WHERE queued > 0;
CREATE INDEX tenant_virtual_time ON tenant (virtual_time);

-- A tenant's day (UTC). `deleted` counts those of the `created` whose rows are gone.
CREATE TABLE tenant_day (
    tenant_id TEXT NOT NULL REFERENCES tenant (id),
    day BIGINT NOT NULL,
    created BIGINT NOT NULL,
    deleted BIGINT NOT NULL,
    completed BIGINT NOT NULL,
    failed BIGINT NOT NULL,
    PRIMARY KEY (tenant_id, day)
);

-- A stored file that some build has. A row without a build is a mistake.
CREATE TABLE artifact (
    artifact_key TEXT NOT NULL PRIMARY KEY,
    size_bytes BIGINT NOT NULL CHECK (size_bytes >= 0),
    sha256 TEXT NOT NULL,
    created_at BIGINT NOT NULL
);
CREATE INDEX artifact_age ON artifact (created_at, artifact_key, size_bytes);

-- What a build need not be built for.
CREATE TABLE artifact_name (
    sharing_domain TEXT NOT NULL,
    recipe TEXT NOT NULL,
    artifact_key TEXT NOT NULL REFERENCES artifact (artifact_key),
    result TEXT NOT NULL,
    PRIMARY KEY (sharing_domain, recipe)
);
CREATE INDEX artifact_name_key ON artifact_name (artifact_key);

-- How many completed builds of a tenant have an artifact: it counts once in the storage.
CREATE TABLE tenant_artifact (
    tenant_id TEXT NOT NULL REFERENCES tenant (id),
    artifact_key TEXT NOT NULL REFERENCES artifact (artifact_key),
    builds BIGINT NOT NULL CHECK (builds >= 0),
    PRIMARY KEY (tenant_id, artifact_key)
);
CREATE INDEX tenant_artifact_key ON tenant_artifact (artifact_key);

-- A build. What is long stands last, so that counting reads little.
CREATE TABLE build (
    tenant_id TEXT NOT NULL REFERENCES tenant (id),
    id TEXT NOT NULL,
    state TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    run_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    started_at BIGINT,
    ended_at BIGINT,
    attempt BIGINT NOT NULL,
    attempt_started_at BIGINT,
    wall_us BIGINT NOT NULL CHECK (wall_us >= 0),
    progress_percent BIGINT NOT NULL,
    lease_token BIGINT NOT NULL,
    lease_owner TEXT,
    lease_expires_at BIGINT,
    cancel_requested_at BIGINT,
    -- While the build runs: the file it is about to take. Afterwards: the file it has; none when
    -- the file was removed, and then `artifact_bytes` still says how big it was.
    artifact_key TEXT REFERENCES artifact (artifact_key),
    artifact_bytes BIGINT,
    event_seq BIGINT NOT NULL,
    log_lines BIGINT NOT NULL,
    log_bytes BIGINT NOT NULL,
    log_is_cut BIGINT NOT NULL,
    step TEXT NOT NULL,
    cancel_reason TEXT,
    tier TEXT NOT NULL,
    customer TEXT,
    traceparent TEXT,
    idempotency_key TEXT,
    request_hash TEXT NOT NULL,
    sealed_credentials BYTEA,
    limits TEXT NOT NULL,
    request TEXT NOT NULL,
    attempts TEXT NOT NULL,
    failure TEXT,
    result TEXT,
    PRIMARY KEY (tenant_id, id),
    UNIQUE (tenant_id, idempotency_key),
    CHECK (
        (lease_owner IS NOT NULL)
        = (state IN ('preparing', 'downloading', 'building', 'optimizing', 'packaging'))
    ),
    CHECK ((lease_owner IS NOT NULL) = (lease_expires_at IS NOT NULL)),
    CHECK (
        (ended_at IS NOT NULL) = (state IN ('completed', 'failed', 'cancelled', 'timeout'))
    ),
    CHECK (ended_at IS NULL OR sealed_credentials IS NULL),
    CHECK ((state = 'completed') = (result IS NOT NULL))
);
CREATE INDEX build_queue ON build (tenant_id, run_at, id) WHERE state = 'queued';
CREATE INDEX build_state ON build (tenant_id, state, id);
CREATE INDEX build_created ON build (tenant_id, created_at);
CREATE INDEX build_lease ON build (lease_expires_at) WHERE lease_owner IS NOT NULL;
CREATE INDEX build_artifact ON build (artifact_key) WHERE artifact_key IS NOT NULL;
CREATE INDEX build_kept ON build (ended_at)
    WHERE ended_at IS NOT NULL AND artifact_key IS NOT NULL;

-- What happened to a build, in order: the first row's `from_state` is empty.
CREATE TABLE build_event (
    tenant_id TEXT NOT NULL,
    build_id TEXT NOT NULL,
    seq BIGINT NOT NULL,
    happened_at BIGINT NOT NULL,
    from_state TEXT NOT NULL,
    to_state TEXT NOT NULL,
    lease_token BIGINT NOT NULL,
    actor TEXT NOT NULL,
    PRIMARY KEY (tenant_id, build_id, seq),
    FOREIGN KEY (tenant_id, build_id) REFERENCES build (tenant_id, id)
);

CREATE TABLE build_log (
    tenant_id TEXT NOT NULL,
    build_id TEXT NOT NULL,
    line BIGINT NOT NULL,
    said_at BIGINT NOT NULL,
    level TEXT NOT NULL,
    component TEXT NOT NULL,
    message TEXT NOT NULL,
    PRIMARY KEY (tenant_id, build_id, line),
    FOREIGN KEY (tenant_id, build_id) REFERENCES build (tenant_id, id)
);

-- Tokens of the API; the secret itself is nowhere.
CREATE TABLE api_token (
    id TEXT NOT NULL PRIMARY KEY,
    secret_hash TEXT NOT NULL UNIQUE,
    tenant_id TEXT NOT NULL,
    customer TEXT,
    rights TEXT NOT NULL,
    note TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT,
    revoked_at BIGINT
);
