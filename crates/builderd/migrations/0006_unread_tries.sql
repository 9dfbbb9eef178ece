-- How often a build that waits was looked at by a node that could not read it; none once one
-- takes it.
ALTER TABLE build ADD COLUMN unread_tries BIGINT;
