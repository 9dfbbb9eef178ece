-- The trigger's own update, which has counted already, would be counted again where triggers recurse.
CREATE TRIGGER build_is_counted AFTER UPDATE ON build
WHEN old.ended_at IS NOT NULL AND new.revision = old.revision
BEGIN
    UPDATE build SET revision = old.revision + 1 WHERE tenant_id = new.tenant_id AND id = new.id;
END;
