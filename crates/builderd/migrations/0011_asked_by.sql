-- Who asked for a build, beside tenant, customer and tier: the organization that the credential names, and
-- the names of its rights as JSON. None where it names no organization, and in what an older node writes.
ALTER TABLE build ADD COLUMN organization TEXT;
ALTER TABLE build ADD COLUMN rights TEXT;
ALTER TABLE api_token ADD COLUMN organization TEXT;
