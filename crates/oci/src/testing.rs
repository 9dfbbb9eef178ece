//! An in-memory registry for tests.
