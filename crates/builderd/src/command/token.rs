//! `builderd token …` and `builderd tenant …`: who may come in, and how much they may use.
//!
//! They work on the database of the same settings as the server, beside it or without it. A
//! token's text is shown once; the database has its hash.

use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;

use secrecy::ExposeSecret as _;
use serde_json::{Value, json};

use super::service_args::{
    FormatArgs, SettingsArgs, TenantArgs, TenantCommand, TenantSetArgs, TokenArgs, TokenCommand,
    TokenCreateArgs,
};
use super::{Failure, text};
use crate::api::REMEMBERED_SECS;
use crate::build::record::Micros;
use crate::clock::{Clock as _, WallClock};
use crate::config::{Config, DatabaseConfig};
use crate::store::audit::Author;
use crate::store::{DirectoryProblem, Listed, Store, StoreError, TenantRow, TokenRow, Unread};
use crate::tenant::{Right, TenantId, TenantLimits, Tier};

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let (code, hint) = match &error {
            StoreError::Full(_) => (5, None),
            StoreError::Unavailable(_) | StoreError::Unreachable { .. } if error.may_pass() => {
                (4, Some("is it running? see `builderd config | grep DATABASE`".to_owned()))
            }
            StoreError::DataDirectory { problem: DirectoryProblem::InUse, .. } => {
                (1, Some("stop the server first".to_owned()))
            }
            StoreError::DataDirectory { .. } => {
                (1, Some("set UNKEY_BUILDERD_DATABASE_DATA_DIR, as for the server".to_owned()))
            }
            StoreError::Unavailable(_)
            | StoreError::Unreachable { .. }
            | StoreError::Corrupt(_)
            | StoreError::Illegal(_)
            | StoreError::Database(_)
            | StoreError::Migrate(_) => {
                (1, Some("is it the right one? see `builderd config | grep DATABASE`".to_owned()))
            }
        };
        Self { code, error: Box::new(error), hint }
    }
}

pub(super) fn tokens(args: &TokenArgs) -> Result<(), Failure> {
    let prepares = matches!(args.command, TokenCommand::Create(_));
    with_store(&args.settings, prepares, async |store, config| match &args.command {
        TokenCommand::Create(args) => {
            let tier = put_tier(&store, &config, &args.tenant, args.tier).await?;
            let (secret, token) = new_token(args);
            store.system_for(&Author::command()).add_token(&token).await?;
            created(&secret, &token, tier, &args.format);
            Ok(())
        }
        TokenCommand::List { format } => {
            list_tokens(&store.system().tokens().await?, format);
            Ok(())
        }
        TokenCommand::Revoke { id } => {
            match store.system_for(&Author::command()).revoke_token(id, WallClock.now()).await? {
                true => {
                    in_force().await;
                    put!("{} revoked", text::printable(id));
                    Ok(())
                }
                false => {
                    let error = format!("no token has the id `{id}`").into();
                    let hint = Some("see `builderd token list`".to_owned());
                    Err(Failure { code: 3, error, hint })
                }
            }
        }
    })
}

pub(super) fn tenants(args: &TenantArgs) -> Result<(), Failure> {
    if let TenantCommand::Set(args) = &args.command {
        args.check().map_err(Failure::usage)?;
    }
    let prepares = matches!(args.command, TenantCommand::Set(_));
    with_store(&args.settings, prepares, async |store, config| match &args.command {
        TenantCommand::Set(args) => {
            let old = match store.system().tenant(&args.tenant).await {
                // Nothing is wanted of what was set before.
                Err(StoreError::Corrupt(_)) if args.tier.is_some() && args.tier_limits => None,
                Err(error @ StoreError::Corrupt(_)) => return Err(unreadable(args, error)),
                old => old?,
            };
            let row = changed(args, old, &config);
            store.system_for(&Author::command()).put_tenant(&row).await?;
            in_force().await;
            list_tenants(&Listed { rows: vec![row], unread: Vec::new() }, &config, false);
            Ok(())
        }
        TenantCommand::List { format } => {
            list_tenants(&store.system().tenants().await?, &config, format.is_json());
            Ok(())
        }
    })
}

/// Opens the database that the settings name, and closes it whatever happens. Who `prepares` a
/// server's first start may have to make it.
fn with_store<W>(
    args: &SettingsArgs,
    prepares: bool,
    work: impl FnOnce(Store, Config) -> W,
) -> Result<(), Failure>
where
    W: Future<Output = Result<(), Failure>>,
{
    let config = super::config::load(args, Vec::new())?;
    super::builds::block_on(async {
        let store = match &config.database {
            DatabaseConfig::Sqlite if prepares => {
                Store::attach_or_make_sqlite(&config.data_dir).await?
            }
            DatabaseConfig::Sqlite => Store::attach_sqlite(&config.data_dir).await?,
            DatabaseConfig::Postgres { url, .. } => {
                Store::attach_postgres(url.expose_secret()).await?
            }
        };
        let result = work(store.clone(), config).await;
        store.close().await;
        result
    })
}

/// Waits until no server believes what was true before: each has looked it up a moment ago.
async fn in_force() {
    tokio::time::sleep(Duration::from_secs(REMEMBERED_SECS)).await;
}

/// A token as the arguments want it, and its secret.
fn new_token(args: &TokenCreateArgs) -> (String, TokenRow) {
    let now = WallClock.now();
    let (secret, id, secret_hash) = crate::api::new_token();
    let token = TokenRow {
        id,
        secret_hash,
        tenant: args.tenant.clone(),
        customer: args.customer.clone(),
        organization: args.organization.clone(),
        rights: rights(&args.permission),
        note: args.note.clone(),
        created_at: now,
        expires_at: args.expires.map(|life| now.plus_secs(life.as_secs())),
        revoked_at: None,
    };
    (secret, token)
}

/// Every right unless some are named.
fn rights(named: &[Right]) -> Vec<String> {
    let named: BTreeSet<Right> = match named.is_empty() {
        true => Right::ALL.into_iter().collect(),
        false => named.iter().copied().collect(),
    };
    named.into_iter().map(|right| right.as_str().to_owned()).collect()
}

/// Sets the tier if one is given, else leaves a tenant's as it is; gives what holds.
async fn put_tier(
    store: &Store,
    config: &Config,
    tenant: &TenantId,
    tier: Option<Tier>,
) -> Result<Tier, StoreError> {
    let old = store.system().tenant(tenant).await?;
    match (old, tier) {
        (Some(old), None) => Ok(old.tier),
        (Some(old), Some(tier)) => {
            store.system_for(&Author::command()).put_tenant(&TenantRow { tier, ..old }).await?;
            in_force().await;
            Ok(tier)
        }
        (None, tier) => {
            let tier = tier.unwrap_or(config.tenants.default_tier);
            let row = TenantRow { id: tenant.clone(), tier, limits: None };
            store.system_for(&Author::command()).put_tenant(&row).await?;
            Ok(tier)
        }
    }
}

fn created(secret: &str, token: &TokenRow, tier: Tier, format: &FormatArgs) {
    if format.is_json() {
        let mut value = token_json(token, WallClock.now());
        value["token"] = secret.into();
        value["tier"] = tier.as_str().into();
        put!("{value}");
        return;
    }
    put!("{secret}");
    tell!(
        "token {} for tenant {} ({}): {}",
        token.id,
        token.tenant,
        tier.as_str(),
        token.rights.join(", ")
    );
    tell!("it is not kept and cannot be shown again");
}

fn list_tokens(tokens: &Listed<TokenRow>, format: &FormatArgs) {
    let now = WallClock.now();
    if format.is_json() {
        let known = tokens.rows.iter().map(|token| token_json(token, now));
        put!("{}", known.chain(unread_json("id", &tokens.unread)).collect::<Value>());
        return;
    }
    put!(
        "{:<22} {:<20} {:<12} {:<12} {:<8} {:<20} {:<20} PERMISSIONS",
        "ID",
        "TENANT",
        "CUSTOMER",
        "ORGANIZATION",
        "STATE",
        "CREATED",
        "EXPIRES"
    );
    for token in &tokens.rows {
        put!(
            "{:<22} {:<20} {:<12} {:<12} {:<8} {:<20} {:<20} {}{}",
            token.id,
            token.tenant.as_str(),
            token.customer.as_deref().map_or("-".into(), text::printable),
            token.organization.as_deref().map_or("-".into(), text::printable),
            token_state(token, now),
            moment(token.created_at),
            token.expires_at.map_or("never".into(), moment),
            token.rights.join(","),
            match token.note.as_str() {
                "" => String::new(),
                note => format!("  # {}", text::printable(note)),
            }
        );
    }
    list_unread(&tokens.unread);
}

/// The rows of a list that cannot be read, behind those that can.
fn list_unread(unread: &[Unread]) {
    for Unread { id, problem } in unread {
        put!("{:<22} cannot be read: {}", text::printable(id), text::printable(problem));
    }
}

fn unread_json(name: &str, unread: &[Unread]) -> impl Iterator<Item = Value> {
    unread.iter().map(move |row| json!({name: row.id, "unreadable": row.problem}))
}

fn token_state(token: &TokenRow, now: Micros) -> &'static str {
    match (token.revoked_at, token.expires_at) {
        (Some(_), _) => "revoked",
        (None, Some(end)) if end <= now => "expired",
        (None, _) => "valid",
    }
}

fn token_json(token: &TokenRow, now: Micros) -> Value {
    json!({
        "id": token.id,
        "tenant": token.tenant,
        "customer": token.customer,
        "organization": token.organization,
        "permissions": token.rights,
        "note": token.note,
        "state": token_state(token, now),
        "createdAt": moment(token.created_at),
        "expiresAt": token.expires_at.map(moment),
        "revokedAt": token.revoked_at.map(moment),
    })
}

/// A moment as RFC 3339 writes it, to the second.
fn moment(at: Micros) -> String {
    let moment = jiff::Timestamp::from_second(at.0.div_euclid(Micros::SECOND));
    moment.map_or_else(|_| at.0.to_string(), |moment| moment.to_string())
}

/// What to do about a tenant whose row cannot be read.
fn unreadable(args: &TenantSetArgs, error: StoreError) -> Failure {
    let hint = format!(
        "a newer version set it, which can change it; or set it anew: `builderd tenant set {} \
         --tier TIER --tier-limits`, and then the limits of its own",
        args.tenant
    );
    Failure { code: 1, error: Box::new(error), hint: Some(hint) }
}

/// A tenant's row as the arguments want it.
fn changed(args: &TenantSetArgs, old: Option<TenantRow>, config: &Config) -> TenantRow {
    let tier = args.tier.or(old.as_ref().map(|row| row.tier));
    let tier = tier.unwrap_or(config.tenants.default_tier);
    let kept = old.and_then(|row| row.limits).filter(|_| !args.tier_limits);
    let base = kept.clone().unwrap_or_else(|| of_tier(config, tier));
    let wanted = TenantLimits {
        concurrent_builds: args.concurrent_builds.unwrap_or(base.concurrent_builds),
        daily_builds: args.daily_builds.unwrap_or(base.daily_builds),
        storage_bytes: args.storage.unwrap_or(base.storage_bytes),
        memory_bytes: args.memory.unwrap_or(base.memory_bytes),
        cpu_cores: args.cpu_cores.unwrap_or(base.cpu_cores),
        disk_bytes: args.disk.unwrap_or(base.disk_bytes),
        timeout_secs: args.timeout.map_or(base.timeout_secs, |timeout| {
            u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX)
        }),
        build_minutes: args.timeout.map_or(base.build_minutes, |timeout| {
            u32::try_from(timeout.as_secs().div_ceil(60)).unwrap_or(u32::MAX)
        }),
        allowed_registries: match args.registry.as_slice() {
            [] => base.allowed_registries.clone(),
            registries if registries.iter().any(|name| name == "*") => Vec::new(),
            registries => registries.to_vec(),
        },
        external_network: base.external_network,
    };
    // What nobody asked for stays the tier's, also when the tier changes later.
    let limits = if kept.is_some() || wanted != base { Some(wanted) } else { None };
    TenantRow { id: args.tenant.clone(), tier, limits }
}

fn of_tier(config: &Config, tier: Tier) -> TenantLimits {
    let limits = Tier::ALL.into_iter().zip(&config.tenants.limits);
    let own = limits.into_iter().find(|(of, _)| *of == tier);
    own.map_or_else(|| tier.limits(), |(_, limits)| limits.clone())
}

fn list_tenants(tenants: &Listed<TenantRow>, config: &Config, as_json: bool) {
    if as_json {
        let known = tenants.rows.iter().map(|row| {
            let limits = row.limits.clone().unwrap_or_else(|| of_tier(config, row.tier));
            json!({
                "tenant": row.id,
                "tier": row.tier,
                "limits": limits,
                "ownLimits": row.limits.is_some(),
            })
        });
        put!("{}", known.chain(unread_json("tenant", &tenants.unread)).collect::<Value>());
        return;
    }
    put!(
        "{:<24} {:<11} {:>8} {:>8} {:>11} LIMITS",
        "TENANT",
        "TIER",
        "PARALLEL",
        "DAILY",
        "STORAGE"
    );
    for row in &tenants.rows {
        let limits = row.limits.clone().unwrap_or_else(|| of_tier(config, row.tier));
        put!(
            "{:<24} {:<11} {:>8} {:>8} {:>11} {}",
            row.id.as_str(),
            row.tier.as_str(),
            limits.concurrent_builds,
            limits.daily_builds,
            text::bytes(limits.storage_bytes),
            if row.limits.is_some() { "own" } else { "of the tier" }
        );
    }
    list_unread(&tenants.unread);
}
