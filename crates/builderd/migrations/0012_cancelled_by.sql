-- Who asked for a cancel: the id of the token or certificate; none in what an older node writes. The worker, or
-- whoever ends the build in its place, says it in the build's log.
ALTER TABLE build ADD COLUMN cancelled_by TEXT;
