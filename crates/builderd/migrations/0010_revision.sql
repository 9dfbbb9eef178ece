-- How often an ended build's row was changed: what was answered of it once is true as long as this is
-- the same. Counted by a trigger, so that whoever changes the row counts: an older node, a command, a
-- hand.
ALTER TABLE build ADD COLUMN revision BIGINT NOT NULL DEFAULT 0;
