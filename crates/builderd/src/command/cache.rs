//! `builderd cache ls | prune | verify`.

use super::args::{CacheArgs, CacheCommand, CacheLocation};
use super::{Failure, text};
use crate::config::Environment;
use crate::packs::{CacheEntry, Lookup, PackCache};

pub(super) fn open(
    location: &CacheLocation,
    environment: &Environment,
) -> Result<PackCache, Failure> {
    let directory = match (&location.cache_dir, &environment.cache_home) {
        (Some(directory), _) => directory.clone(),
        (None, Some(home)) => home.join("builderd"),
        (None, None) => {
            return Err(Failure::usage(
                "no place for the layer cache: set --cache-dir, or HOME, or build with --no-cache",
            ));
        }
    };
    PackCache::open(&directory).map_err(Failure::ours)
}

pub(super) fn run(args: &CacheArgs) -> Result<(), Failure> {
    let cache = open(&args.location, &Environment::read())?;
    match args.command {
        CacheCommand::Ls { json } => list(&cache.entries().map_err(Failure::ours)?, json),
        CacheCommand::Prune { all } => {
            let limit = if all { 0 } else { args.location.cache_limit };
            let pruned = cache.prune(limit).map_err(Failure::ours)?;
            put!("removed {} packs, {}", pruned.packs, text::bytes(pruned.bytes));
        }
        CacheCommand::Verify => verify(&cache)?,
    }
    Ok(())
}

fn list(entries: &[CacheEntry], json: bool) {
    if json {
        let entries: Vec<_> = entries
            .iter()
            .map(|entry| {
                serde_json::json!({
                    "domain": entry.key.domain.as_str(),
                    "digest": entry.key.digest.to_string(),
                    "size_bytes": entry.size_bytes,
                    "last_used_secs": entry.last_used_secs,
                })
            })
            .collect();
        put!("{}", serde_json::Value::from(entries));
        return;
    }
    for entry in entries {
        let (domain, digest) = (entry.key.domain.as_str(), &entry.key.digest);
        put!("{:>12}  {domain}  {digest}", text::bytes(entry.size_bytes));
    }
    let total = entries.iter().map(|entry| entry.size_bytes).sum();
    put!("{} packs, {}", entries.len(), text::bytes(total));
}

fn verify(cache: &PackCache) -> Result<(), Failure> {
    let (mut good, mut damaged) = (0, 0);
    for entry in cache.entries().map_err(Failure::ours)? {
        match cache.verify(&entry.key).map_err(Failure::ours)? {
            Lookup::Hit(_) => good += 1,
            // Pruned by someone else meanwhile.
            Lookup::Miss => {}
            Lookup::Damaged(error) => {
                damaged += 1;
                put!("damaged, removed: {}: {error}", entry.key.digest);
            }
        }
    }
    put!("{good} packs good, {damaged} damaged");
    if damaged == 0 {
        return Ok(());
    }
    Err(Failure {
        code: 1,
        error: format!("{damaged} damaged packs were removed").into(),
        hint: Some("the next build that needs them makes them anew".into()),
    })
}
