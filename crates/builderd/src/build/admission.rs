//! Which builds run beside each other: one starts when the disk and the memory that it will
//! probably take at its most are free beside what the others may still take.
//!
//! Builds are let in in the order they came, so that a large one is not passed by small ones for
//! ever. This module does not know tenants: their turns are the queue's business.

mod memory;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use oci::Image;
use tokio::sync::Notify;

use super::disk::lock;
use super::record::{Failure, FailureCode};
use crate::tenant::TenantLimits;

/// How often free space is looked at again by a build that waits for others.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Files of an image per compressed byte, at the most that real layers show.
const INFLATION: u64 = 6;
/// Beside the files: journal, inode tables, free space, which are mostly holes.
const OVERHEAD_BYTES: u64 = 128 << 20;
/// What three processes take for the usual image.
pub(super) const MEMORY_BYTES_USUAL: u64 = 192 << 20;
/// Memory for names and attributes, as a part of the compressed image.
const MEMORY_PART: u64 = 16;
/// Left for the service and the rest of the host, in hundredths.
const SPARE_PERCENT: u64 = 10;

/// What a build takes at its most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// On each file system that it writes to.
    pub(super) disk_bytes: u64,
    pub(super) memory_bytes: u64,
}

impl Needs {
    /// Told by the manifest; never more than the kernel will let it have.
    pub(super) fn of(image: &Image, limits: &TenantLimits) -> Self {
        let compressed: u64 =
            image.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.size_bytes));
        // Packs and image lie beside each other while the data is moved. Where the packs were written into
        // what was to become the image, and it cannot, they are there twice; real layers are not so large.
        let files = compressed.saturating_mul(2 * INFLATION).saturating_add(OVERHEAD_BYTES);
        let memory = MEMORY_BYTES_USUAL.saturating_add(compressed / MEMORY_PART);
        Self {
            disk_bytes: files.min(limits.disk_bytes.saturating_mul(3)),
            memory_bytes: memory.min(limits.memory_bytes),
        }
    }

    fn fit(self, free: Self) -> bool {
        self.disk_bytes <= free.disk_bytes && self.memory_bytes <= free.memory_bytes
    }
}

/// What builds of this process may still take.
#[derive(Debug)]
pub(super) struct Admission {
    /// File systems that builds write to.
    directories: Vec<PathBuf>,
    taken: Mutex<Needs>,
    freed: Notify,
    /// Who waits, in order.
    turn: tokio::sync::Mutex<()>,
}

/// A build's share; given back when dropped.
#[derive(Debug)]
pub(super) struct Share {
    admission: Arc<Admission>,
    needs: Needs,
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = lock(&self.admission.taken);
        taken.disk_bytes -= self.needs.disk_bytes;
        taken.memory_bytes -= self.needs.memory_bytes;
        drop(taken);
        self.admission.freed.notify_waiters();
    }
}

impl Admission {
    pub(super) fn new(directories: Vec<PathBuf>) -> Arc<Self> {
        let (taken, freed, turn) = Default::default();
        Arc::new(Self { directories, taken, freed, turn })
    }

    /// Waits until `needs` are free; `waiting` is called once, before the first wait. May be
    /// dropped at any point.
    ///
    /// # Errors
    /// The [`Failure`] of a build that does not fit although no other runs.
    pub(super) async fn admit(
        self: &Arc<Self>,
        needs: Needs,
        waiting: impl FnOnce(),
    ) -> Result<Share, Failure> {
        let mut waiting = Some(waiting);
        let _turn = self.turn.lock().await;
        loop {
            let freed = self.freed.notified();
            let free = self.free();
            if let Some(alone) = self.try_take(needs, free) {
                return match alone {
                    true => Ok(Share { admission: Arc::clone(self), needs }),
                    false => Err(too_much(needs, free)),
                };
            }
            if let Some(waiting) = waiting.take() {
                waiting();
            }
            let _ = tokio::time::timeout(LOOK_AGAIN, freed).await;
        }
    }

    /// True: taken. False: it would not fit even alone. None: others are in the way.
    fn try_take(&self, needs: Needs, free: Needs) -> Option<bool> {
        let mut taken = lock(&self.taken);
        let left = Needs {
            disk_bytes: free.disk_bytes.saturating_sub(taken.disk_bytes),
            memory_bytes: free.memory_bytes.saturating_sub(taken.memory_bytes),
        };
        if needs.fit(left) {
            taken.disk_bytes += needs.disk_bytes;
            taken.memory_bytes += needs.memory_bytes;
            return Some(true);
        }
        (*taken == Needs::default()).then_some(false)
    }

    /// What there is: all the memory that this process may have but a part, and the disk space that
    /// is free now. What running builds have written already counts twice, which errs to the safe
    /// side.
    fn free(&self) -> Needs {
        let disk = self.directories.iter().map(|directory| free_disk_bytes(directory)).min();
        Needs {
            disk_bytes: disk.unwrap_or(u64::MAX),
            memory_bytes: memory::bytes() / 100 * (100 - SPARE_PERCENT),
        }
    }
}

/// What cannot be asked is not in the way: writing will tell.
fn free_disk_bytes(directory: &Path) -> u64 {
    rustix::fs::statvfs(directory)
        .map_or(u64::MAX, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn too_much(needs: Needs, free: Needs) -> Failure {
    let (code, cause) = match needs.disk_bytes > free.disk_bytes {
        true => (
            FailureCode::StorageFull,
            format!(
                "the build needs about {} bytes of disk, and {} are free",
                needs.disk_bytes, free.disk_bytes
            ),
        ),
        false => (
            FailureCode::TemporaryResourceError,
            format!(
                "the build needs about {} bytes of memory, and there are {} for builds",
                needs.memory_bytes, free.memory_bytes
            ),
        ),
    };
    Failure {
        code,
        step: "start".into(),
        cause,
        blame: "ours".into(),
        remedy: "try again later, or use a smaller image".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Needs = Needs { disk_bytes: 100, memory_bytes: 100 };

    fn needs(disk_bytes: u64, memory_bytes: u64) -> Needs {
        Needs { disk_bytes, memory_bytes }
    }

    #[test]
    fn what_fits_beside_the_others_runs_and_what_does_not_waits() {
        let admission = Admission::new(Vec::new());
        assert_eq!(admission.try_take(needs(60, 60), FREE), Some(true));
        assert_eq!(admission.try_take(needs(50, 1), FREE), None, "the disk is taken");
        assert_eq!(admission.try_take(needs(1, 50), FREE), None, "the memory is taken");
        assert_eq!(admission.try_take(needs(40, 40), FREE), Some(true));
        assert_eq!(admission.try_take(needs(0, 1), FREE), None);
    }

    #[test]
    fn what_never_fits_does_not_wait_for_ever() {
        let admission = Admission::new(Vec::new());
        assert_eq!(admission.try_take(needs(101, 1), FREE), Some(false));
        assert_eq!(too_much(needs(101, 1), FREE).code, FailureCode::StorageFull);
        assert_eq!(too_much(needs(1, 101), FREE).code, FailureCode::TemporaryResourceError);
    }

    #[tokio::test(start_paused = true)]
    async fn shares_are_given_back_and_builds_come_in_in_order() {
        let admission = Admission::new(Vec::new());
        let all = Needs { memory_bytes: admission.free().memory_bytes, disk_bytes: 0 };
        let first = admission.admit(all, || panic!("nothing is in the way")).await.unwrap();
        let (told, order) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(Vec::new())));
        let waiters: Vec<_> = [all, needs(0, 1)]
            .into_iter()
            .enumerate()
            .map(|(number, needs)| {
                let (admission, told) = (Arc::clone(&admission), Arc::clone(&told));
                let order = Arc::clone(&order);
                tokio::spawn(async move {
                    let share = admission.admit(needs, || *lock(&told) += 1).await.unwrap();
                    lock(&order).push(number);
                    drop(share);
                })
            })
            .collect();
        tokio::time::sleep(10 * LOOK_AGAIN).await;
        assert!(lock(&order).is_empty(), "the small one does not pass the large one");
        assert_eq!(*lock(&told), 1);
        drop(first);
        for waiter in waiters {
            waiter.await.unwrap();
        }
        assert_eq!(*lock(&order), [0, 1]);
        assert_eq!(*lock(&admission.taken), Needs::default());
    }
}
