-- No row is changed, and none goes that its stream still has.
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit
BEGIN
    SELECT RAISE(ABORT, 'the audit log is append-only');
END;
CREATE TRIGGER audit_is_kept BEFORE DELETE ON audit
WHEN old.number >= COALESCE(
    (SELECT first_number FROM audit_stream WHERE tenant_id = old.tenant_id), 0)
BEGIN
    SELECT RAISE(ABORT, 'the audit log is append-only');
END;
