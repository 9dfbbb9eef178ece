//! What the commands of builds may reach, as the operator allows it: by tier, and for single
//! tenants. It knows no address.

use std::str::FromStr;

use oci::AllowedName;

use super::settings::Settings;
use crate::tenant::{TenantId, Tier};

/// Hosts that commands may reach, by who ordered them.
#[derive(Clone, Debug, Default)]
pub(crate) struct CommandsEgress {
    tiers: Vec<(Tier, String)>,
    tenants: Vec<(TenantId, String)>,
    /// What all commands of a build together may send and get.
    pub(crate) bytes_max: u64,
}

impl CommandsEgress {
    pub(super) fn of(settings: &Settings) -> Self {
        fn entries<T: FromStr>(entries: &[String]) -> Vec<(T, String)> {
            let entries = entries.iter().filter_map(|entry| entry.split_once('='));
            entries.filter_map(|(who, host)| Some((who.parse().ok()?, host.to_owned()))).collect()
        }
        Self {
            tiers: entries(&settings.names("COMMANDS_EGRESS")),
            tenants: entries(&settings.names("COMMANDS_EGRESS_OF_TENANTS")),
            bytes_max: settings.size("COMMANDS_EGRESS_MAX_SIZE_GB").unwrap_or_default(),
        }
    }

    /// The hosts that the commands of a tenant may reach; nothing at all when there are none. What
    /// is allowed to a tier is so to those above it.
    pub(crate) fn names(&self, tier: Tier, tenant: &TenantId) -> Vec<String> {
        let of_tier = self.tiers.iter().filter(|(from, _)| *from <= tier).map(|(_, host)| host);
        let own = self.tenants.iter().filter(|(of, _)| of == tenant).map(|(_, host)| host);
        of_tier.chain(own).cloned().collect()
    }
}

/// `TIER=HOST`, of a tier that may reach out.
pub(super) fn name_of_tier(text: &str) -> Result<String, String> {
    let expected = "`TIER=HOST[:PORT]`, such as `pro=deb.debian.org`";
    let (tier, host) = text.split_once('=').ok_or(expected)?;
    let tier: Tier = tier.trim().parse()?;
    if !tier.limits().external_network {
        return Err(format!(
            "a tier whose commands may reach out: those of `{}` may not; name single tenants in \
             COMMANDS_EGRESS_OF_TENANTS",
            tier.as_str()
        ));
    }
    Ok(format!("{}={}", tier.as_str(), name(host)?))
}

/// `TENANT=HOST`.
pub(super) fn name_of_tenant(text: &str) -> Result<String, String> {
    let expected = "`TENANT=HOST[:PORT]`, such as `acme=deb.debian.org`";
    let (tenant, host) = text.split_once('=').ok_or(expected)?;
    let tenant: TenantId = tenant.trim().parse().map_err(|error| format!("a tenant: {error}"))?;
    Ok(format!("{tenant}={}", name(host)?))
}

fn name(host: &str) -> Result<AllowedName, String> {
    host.trim().parse().map_err(|_| {
        "`HOST[:PORT]`, `*.DOMAIN[:PORT]` or `*[:PORT]` behind the `=`, without a scheme".to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::super::settings::Sources;
    use super::super::table::PREFIX;
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<CommandsEgress, String> {
        let variable =
            |&(name, value): &(&str, &str)| (format!("{PREFIX}{name}"), value.to_owned());
        let environment = pairs.iter().map(variable).collect();
        let sources = Sources { environment, ..Sources::default() };
        let settings = Settings::resolve(&sources).map_err(|error| error.to_string())?;
        Ok(CommandsEgress::of(&settings))
    }

    #[test]
    fn commands_reach_what_their_tier_those_below_and_their_tenant_are_allowed() {
        let rules = read(&[
            ("COMMANDS_EGRESS", "pro=deb.debian.org, enterprise = *.NPMJS.org:443"),
            ("COMMANDS_EGRESS_OF_TENANTS", "acme=pypi.org,bank=*"),
        ])
        .unwrap();
        let names = |tier, tenant: &str| rules.names(tier, &tenant.parse().unwrap()).join(" ");
        assert_eq!(names(Tier::Free, "x"), "");
        assert_eq!(names(Tier::Free, "acme"), "pypi.org");
        assert_eq!(names(Tier::Pro, "acme"), "deb.debian.org pypi.org");
        assert_eq!(names(Tier::Pro, "acme2"), "deb.debian.org");
        assert_eq!(names(Tier::Dedicated, "x"), "deb.debian.org *.npmjs.org:443");
        assert_eq!(rules.bytes_max, 5 << 30);
        let nothing = read(&[]).unwrap();
        for tier in Tier::ALL {
            assert!(nothing.names(tier, &"x".parse().unwrap()).is_empty());
        }
    }

    #[test]
    fn what_allows_nobody_or_nothing_stops_the_start() {
        for (name, bad, word) in [
            ("COMMANDS_EGRESS", "deb.debian.org", "pro=deb.debian.org"),
            ("COMMANDS_EGRESS", "free=deb.debian.org", "COMMANDS_EGRESS_OF_TENANTS"),
            ("COMMANDS_EGRESS", "gold=deb.debian.org", "is no tier"),
            ("COMMANDS_EGRESS", "pro=https://deb.debian.org", "without a scheme"),
            ("COMMANDS_EGRESS_OF_TENANTS", "../x=deb.debian.org", "a tenant"),
            ("COMMANDS_EGRESS_OF_TENANTS", "acme=", "HOST[:PORT]"),
            ("COMMANDS_EGRESS_MAX_SIZE_GB", "0", "GiB"),
        ] {
            let error = read(&[(name, bad)]).unwrap_err();
            assert!(error.contains(word) && error.contains(name), "{bad}: {error}");
        }
    }
}
