//! Bodies of requests that are refused before they are read.
//!
//! Over HTTP/1.1 a sender sees a broken connection in the place of an answer that comes while it
//! still sends. So what it sends is read and thrown away: so much of it, for so long, and of so
//! many senders at once. Whoever is one too many, sends more or is slower is cut off.

use std::time::Duration;

use axum::body::Body;
use http_body_util::BodyExt as _;
use tokio::sync::Semaphore;

/// What is read of a body.
const BYTES_MAX: usize = 8 << 20;
/// How long it is read.
const TIME_MAX: Duration = Duration::from_secs(3);
/// How many are read at once. Each holds one frame of its body at most.
const AT_ONCE_MAX: usize = 64;

/// Reads bodies that nobody wants.
pub(super) struct Swallow {
    places: Semaphore,
}

impl Swallow {
    pub(super) fn new() -> Self {
        Self { places: Semaphore::new(AT_ONCE_MAX) }
    }

    /// Reads a body within the bounds of the module; keeps nothing of it.
    pub(super) async fn swallow(&self, body: Body) {
        let Ok(_place) = self.places.try_acquire() else { return };
        // Whoever is too slow is cut off.
        let _ = tokio::time::timeout(TIME_MAX, read(body)).await;
    }
}

async fn read(mut body: Body) {
    let mut left = BYTES_MAX;
    while let Some(Ok(frame)) = body.frame().await {
        let bytes = frame.data_ref().map_or(0, |data| data.len());
        match left.checked_sub(bytes) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::body::Bytes;
    use futures_util::{StreamExt as _, stream};

    /// Bytes of frames that were made and are still held.
    #[derive(Clone, Default)]
    struct Held {
        now: Arc<AtomicUsize>,
        most: Arc<AtomicUsize>,
        made: Arc<AtomicUsize>,
    }

    struct Frame(Vec<u8>, Held);

    impl AsRef<[u8]> for Frame {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }

    impl Drop for Frame {
        fn drop(&mut self) {
            self.1.now.fetch_sub(self.0.len(), Ordering::SeqCst);
        }
    }

    impl Held {
        /// A body of so many frames of 64 KiB.
        fn body(&self, frames: usize) -> Body {
            let held = self.clone();
            Body::from_stream(stream::iter(0..frames).map(move |_| {
                let frame = Frame(vec![0; 64 << 10], held.clone());
                let now = held.now.fetch_add(frame.0.len(), Ordering::SeqCst) + frame.0.len();
                held.most.fetch_max(now, Ordering::SeqCst);
                held.made.fetch_add(1, Ordering::SeqCst);
                Ok::<_, Infallible>(Bytes::from_owner(frame))
            }))
        }
    }

    #[tokio::test]
    async fn what_is_swallowed_is_not_kept() {
        let held = Held::default();
        Swallow::new().swallow(held.body(100)).await;
        assert_eq!(held.made.load(Ordering::SeqCst), 100, "all of it is read");
        assert!(held.most.load(Ordering::SeqCst) <= 128 << 10, "and let go at once");
        assert_eq!(held.now.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn nobody_is_listened_to_for_ever() {
        let held = Held::default();
        Swallow::new().swallow(held.body(10_000)).await;
        let frames = BYTES_MAX / (64 << 10);
        assert_eq!(held.made.load(Ordering::SeqCst), frames + 1);
    }

    #[tokio::test]
    async fn only_so_many_are_swallowed_at_once() {
        let swallow = Arc::new(Swallow::new());
        let silent = || Body::from_stream(stream::pending::<Result<Bytes, Infallible>>());
        let mut slow = tokio::task::JoinSet::new();
        for _ in 0..AT_ONCE_MAX {
            let swallow = Arc::clone(&swallow);
            slow.spawn(async move { swallow.swallow(silent()).await });
        }
        while swallow.places.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let held = Held::default();
        swallow.swallow(held.body(10)).await;
        assert_eq!(held.made.load(Ordering::SeqCst), 0, "one too many is not read");
        slow.shutdown().await;
        swallow.swallow(held.body(10)).await;
        assert_eq!(held.made.load(Ordering::SeqCst), 10, "their places are free again");
    }
}
