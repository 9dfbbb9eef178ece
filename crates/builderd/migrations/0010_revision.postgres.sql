CREATE FUNCTION build_counts_changes() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    new.revision := old.revision + 1;
    RETURN new;
END
$$;
CREATE TRIGGER build_is_counted BEFORE UPDATE ON build
    FOR EACH ROW WHEN (old.ended_at IS NOT NULL) EXECUTE FUNCTION build_counts_changes();
