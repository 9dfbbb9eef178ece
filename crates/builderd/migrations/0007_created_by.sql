-- Which credential created a build: the id of its token, none in development mode. Whoever names
-- the same idempotency key is told of the build only with the same credential, or if it may read.
ALTER TABLE build ADD COLUMN created_by TEXT;
