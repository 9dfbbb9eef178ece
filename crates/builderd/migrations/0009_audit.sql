-- Who did what, and who was refused: the audit log. A stream for each tenant, and one, '', for what
-- belongs to none; its rows are numbered without gaps, and each has the SHA-256 over itself and the
-- row before it. Rows are only ever added; what is too old goes from a stream's beginning.

-- Where a stream begins and ends. Held by whoever adds a row, until the end of its transaction.
CREATE TABLE audit_stream (
    -- Not REFERENCES tenant: who is refused need not exist.
    tenant_id TEXT NOT NULL PRIMARY KEY,
    -- The oldest row that is kept, and the hash of the row before it.
    first_number BIGINT NOT NULL,
    base_hash TEXT NOT NULL,
    -- The newest row and its hash.
    last_number BIGINT NOT NULL,
    last_hash TEXT NOT NULL
);

CREATE TABLE audit (
    tenant_id TEXT NOT NULL,
    number BIGINT NOT NULL CHECK (number > 0),
    happened_at BIGINT NOT NULL,
    -- Id of a token or certificate, `development`, or the operator's command.
    subject TEXT NOT NULL,
    action TEXT NOT NULL,
    -- What it was done to: a build, a token, a tenant, a file.
    object TEXT NOT NULL,
    -- `done`, or the code of the refusal.
    outcome TEXT NOT NULL,
    peer TEXT NOT NULL,
    request TEXT NOT NULL,
    hash TEXT NOT NULL,
    PRIMARY KEY (tenant_id, number)
);
CREATE INDEX audit_time ON audit (happened_at, tenant_id, number);

