-- What a running build takes, as JSON: written with the heartbeat, and gone when the build goes
-- back to the queue.
ALTER TABLE build ADD COLUMN live_usage TEXT;
