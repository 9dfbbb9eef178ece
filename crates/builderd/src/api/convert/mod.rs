//! Messages to the service's terms (`order`) and back (`shown`). Decides nothing but what a
//! request means.

mod bounds;
mod order;
mod shown;
mod unimplemented;

use buffa_types::google::protobuf::Timestamp;

use crate::build::record::Micros;
use crate::tenant::Tier;
use api::v1;

pub(super) use bounds::{invalid, none_of};
pub(super) use order::{filter, idempotency_key, order, page_limit, reason, states_of_status};
pub(super) use shown::{job, log_message, log_value, quotas, state, stats, status, tenant_context};
#[cfg(test)]
pub(super) use unimplemented::UNIMPLEMENTED;

/// A time on the wire.
pub(super) fn timestamp(at: Micros) -> Timestamp {
    let (secs, micros) = (at.0.div_euclid(Micros::SECOND), at.0.rem_euclid(Micros::SECOND));
    // Less than a million microseconds are less than a billion nanoseconds.
    let nanos = i32::try_from(micros * 1000).unwrap_or(0);
    Timestamp::from_unix_checked(secs, nanos).unwrap_or_default()
}

/// A time off the wire.
pub(super) fn micros(at: &Timestamp) -> Micros {
    Micros(at.seconds.saturating_mul(Micros::SECOND).saturating_add(i64::from(at.nanos / 1000)))
}

/// A time in plain JSON.
pub(super) fn rfc3339(at: Micros) -> String {
    jiff::Timestamp::from_microsecond(at.0).map(|at| at.to_string()).unwrap_or_default()
}

/// Numbers of the wire are signed; ours count.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn small(number: u64) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// The tier a message names, if it names one.
pub(super) fn tier(named: buffa::EnumValue<v1::TenantTier>) -> Option<Tier> {
    use v1::TenantTier as Wire;
    match named.as_known()? {
        Wire::TENANT_TIER_UNSPECIFIED => None,
        Wire::TENANT_TIER_FREE => Some(Tier::Free),
        Wire::TENANT_TIER_PRO => Some(Tier::Pro),
        Wire::TENANT_TIER_ENTERPRISE => Some(Tier::Enterprise),
        Wire::TENANT_TIER_DEDICATED => Some(Tier::Dedicated),
    }
}

fn tier_on_the_wire(tier: Tier) -> v1::TenantTier {
    use v1::TenantTier as Wire;
    match tier {
        Tier::Free => Wire::TENANT_TIER_FREE,
        Tier::Pro => Wire::TENANT_TIER_PRO,
        Tier::Enterprise => Wire::TENANT_TIER_ENTERPRISE,
        Tier::Dedicated => Wire::TENANT_TIER_DEDICATED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_the_wire() {
        for at in [0, 1, -1, 1_705_363_200_123_456, -62_135_596_800_000_000] {
            assert_eq!(micros(&timestamp(Micros(at))), Micros(at));
        }
        assert_eq!(rfc3339(Micros(1_705_314_600_000_000)), "2024-01-15T10:30:00Z");
    }

    #[test]
    fn tiers_survive_the_wire() {
        for each in Tier::ALL {
            assert_eq!(tier(tier_on_the_wire(each).into()), Some(each));
        }
        assert_eq!(tier(0.into()), None);
        assert_eq!(tier(77.into()), None);
    }
}
