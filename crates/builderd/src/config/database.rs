//! Which database, whichever way it is named.

use std::path::Path;

use secrecy::{ExposeSecret as _, SecretString};

use super::{PREFIX, Settings};
use crate::store::check_postgres_url;

/// Where PostgreSQL is; nothing of it means anything to SQLite. That one takes the number of
/// connections as it comes: many templates say it for both.
const OF_POSTGRES: [&str; 6] = [
    "DATABASE_HOST",
    "DATABASE_PORT",
    "DATABASE_NAME",
    "DATABASE_USERNAME",
    "DATABASE_PASSWORD",
    "DATABASE_SSL_MODE",
];

/// What outlives the process.
#[derive(Debug)]
pub(crate) enum DatabaseConfig {
    /// `builderd.db` in [`Config::data_dir`](super::Config::data_dir).
    Sqlite,
    /// PostgreSQL.
    Postgres {
        /// With user and password.
        url: SecretString,
        /// At most so many connections.
        max_connections: u32,
    },
}

pub(super) fn database(
    settings: &Settings,
    data_dir: &Path,
    problems: &mut Vec<String>,
) -> DatabaseConfig {
    let max_connections = settings.number("DATABASE_MAX_CONNECTIONS").unwrap_or_default();
    let url = settings.secret("DATABASE_URL");
    let given = url.as_ref().map(|url| url.expose_secret());
    let names_postgres =
        given.is_some_and(|url| url.starts_with("postgres://") || url.starts_with("postgresql://"));
    let is_sqlite = match settings.text("DATABASE_TYPE").as_deref() {
        // The URL says it as well.
        _ if names_postgres && !settings.is_set("DATABASE_TYPE") => false,
        Some("postgres" | "postgresql") => false,
        _ => true,
    };
    if is_sqlite {
        let own = data_dir.join("builderd.db");
        if let Some(text) = given
            && !["file:", "sqlite://", "sqlite:"].iter().any(|scheme| {
                text.strip_prefix(scheme).is_some_and(|path| same_file(Path::new(path), &own))
            })
        {
            problems.push(format!(
                "{}: with SQLite the database is {}; set {PREFIX}DATABASE_DATA_DIR, or \
                 {PREFIX}DATABASE_TYPE=postgres for a `postgres://` URL",
                settings.written("DATABASE_URL"),
                own.display()
            ));
        }
        settings.refuse_unused(&OF_POSTGRES, "DATABASE_TYPE", problems);
        return DatabaseConfig::Sqlite;
    }
    let from_parts = postgres_url(settings);
    let (checked, names) = match &url {
        Some(url) => (url, "DATABASE_URL"),
        None => (&from_parts, "DATABASE_HOST"),
    };
    if (url.is_none() || names_postgres)
        && let Err(problem) = check_postgres_url(checked.expose_secret())
    {
        problems.push(format!("{} cannot be used: {problem}", settings.written(names)));
    }
    match (url, names_postgres) {
        (Some(url), true) => DatabaseConfig::Postgres { url, max_connections },
        (Some(_), false) => {
            let name = settings.written("DATABASE_URL");
            problems.push(format!("{name}: expected `postgres://user:password@host:port/name`"));
            DatabaseConfig::Sqlite
        }
        (None, _) => DatabaseConfig::Postgres { url: from_parts, max_connections },
    }
}

fn same_file(one: &Path, two: &Path) -> bool {
    match (std::path::absolute(one), std::path::absolute(two)) {
        (Ok(one), Ok(two)) => one == two,
        _ => false,
    }
}

fn postgres_url(settings: &Settings) -> SecretString {
    let text = |name| settings.text(name).unwrap_or_default();
    let password = settings.secret("DATABASE_PASSWORD");
    let password = match &password {
        Some(password) => format!(":{}", percent_encoded(password.expose_secret())),
        None => String::new(),
    };
    let (user, name) = (text("DATABASE_USERNAME"), text("DATABASE_NAME"));
    SecretString::from(format!(
        "postgres://{}{password}@{}:{}/{}?sslmode={}",
        percent_encoded(&user),
        text("DATABASE_HOST"),
        settings.port("DATABASE_PORT"),
        percent_encoded(&name),
        text("DATABASE_SSL_MODE")
    ))
}

/// RFC 3986, section 2.1: everything but the unreserved characters.
fn percent_encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let encode = |byte: u8| match plain(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}
