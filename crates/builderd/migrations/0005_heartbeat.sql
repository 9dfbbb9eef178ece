-- What is written to see whether the database takes writes. One row, made by the first who looks.
CREATE TABLE heartbeat (
    place BIGINT NOT NULL PRIMARY KEY CHECK (place = 1),
    beats BIGINT NOT NULL
);
