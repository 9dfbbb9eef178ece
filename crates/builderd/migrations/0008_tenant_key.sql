-- Keys under which a tenant's artifacts are sealed, each wrapped by the master key and never plain.
-- At most one of a tenant's is current; a retired one seals nothing new, and stays for as long as an
-- artifact needs it. Who deletes the row makes what was sealed with it unreadable.
CREATE TABLE tenant_key (
    tenant_id TEXT NOT NULL REFERENCES tenant (id),
    id TEXT NOT NULL,
    wrapped BYTEA NOT NULL,
    -- The name of the key that wrapped it.
    wrapped_by TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    retired_at BIGINT,
    PRIMARY KEY (tenant_id, id)
);
CREATE UNIQUE INDEX tenant_key_current ON tenant_key (tenant_id) WHERE retired_at IS NULL;
