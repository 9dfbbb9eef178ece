//! The database.

use super::{Kind, PORT, Setting, setting};

const DATABASES: Kind = Kind::OneOf(&["sqlite", "postgres", "postgresql"]);
const SSL_MODES: Kind =
    Kind::OneOf(&["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]);

pub(super) const DATABASE: &[Setting] = &[
    setting(
        "DATABASE_TYPE",
        DATABASES,
        "sqlite",
        "code",
        "`sqlite` for one node, `postgres` for several.",
    ),
    setting(
        "DATABASE_DATA_DIR",
        Kind::Path,
        "/opt/builderd/data",
        "code",
        "What this node keeps: the SQLite database `builderd.db` and the master key. Not \
         on a network file system.",
    )
    .dev("builderd-data/data"),
    setting(
        "DATABASE_URL",
        Kind::Secret,
        "",
        "guide",
        "`postgres://user:password@host:port/name?sslmode=…`, in the place of the next \
         six. For SQLite `file:PATH`, which must be `builderd.db` in DATABASE_DATA_DIR.",
    ),
    setting("DATABASE_HOST", Kind::Text, "localhost", "code", "PostgreSQL's host."),
    setting("DATABASE_PORT", PORT, "5432", "code", "Its port."),
    setting("DATABASE_NAME", Kind::Text, "builderd", "code", "The database."),
    setting("DATABASE_USERNAME", Kind::Text, "builderd", "code", "The user."),
    setting("DATABASE_PASSWORD", Kind::Secret, "", "code", "Its password."),
    setting(
        "DATABASE_SSL_MODE",
        SSL_MODES,
        "disable",
        "code",
        "Whether the connection is encrypted, and what is checked.",
    ),
    setting(
        "DATABASE_MAX_CONNECTIONS",
        Kind::Number { min: 2, max: 1000 },
        "25",
        "guide",
        "Connections to PostgreSQL; one more hears of changes. SQLite has one writer and \
         four readers.",
    ),
];
