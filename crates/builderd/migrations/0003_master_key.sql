-- Which master key the secrets of waiting builds are sealed with: a name derived from it, never
-- the key. One row, written by the first server.
CREATE TABLE master_key (
    id TEXT NOT NULL PRIMARY KEY,
    place BIGINT NOT NULL UNIQUE CHECK (place = 1)
);
