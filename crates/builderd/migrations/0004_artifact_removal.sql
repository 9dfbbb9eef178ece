-- Files that are being removed at this moment: no build may take such a name until its row is
-- gone, or until the time is over, when whoever wrote it has died.
CREATE TABLE artifact_removal (
    artifact_key TEXT NOT NULL PRIMARY KEY,
    expires_at BIGINT NOT NULL
);
