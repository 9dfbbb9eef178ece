//! A build's log as a stream: what is there, then what comes, until the build has ended.
//!
//! One page is in memory for each follower, and a tenant has only so many followers (`open.rs`). A
//! follower that was cut asks again with the offset
//! behind the last line it has. Who follows is checked anew every few seconds: a token that is
//! revoked or runs out reads no further.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use api::v1;
use connectrpc::{ConnectError, ErrorCode};
use futures_util::{Stream, stream};
use tokio::sync::watch;
use tokio::time::Instant;

use super::auth::{Caller, Claim};
use super::error::Answer;
use super::open::Place;
use super::{ApiState, convert};
use crate::build::record::LogLine;
use crate::build::service::{LogPage, ServiceError};
use crate::store::Changes;
use crate::tenant::{Principal, TenantId};

/// Lines read at once.
const PAGE_LINES: u32 = 200;
/// Of those as many are kept as have so many bytes together, and one: what a follower that does not
/// read holds.
const PAGE_BYTES: usize = 64 << 10;
/// How often a follower looks even if nobody said that something changed.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long a credential is believed that was good.
const RECHECK_EVERY: Duration = Duration::from_secs(2);

/// What a follower wants.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    pub(super) build: String,
    pub(super) follow: bool,
    pub(super) offset: u64,
    pub(super) heartbeat: Option<Duration>,
}

/// Who follows, and what shows that it still may.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    pub(super) who: Principal,
    pub(super) caller: Caller,
    pub(super) claim: Claim,
}

/// One follower of one log.
struct Follower {
    state: Arc<ApiState>,
    reader: Reader,
    /// When `reader` was last known to be let in.
    checked: Instant,
    wish: Wish,
    /// Lines read and not yet sent.
    lines: VecDeque<LogLine>,
    /// Whether nothing follows `lines`.
    is_end: bool,
    last_sent: Instant,
    changes: Changes,
    shutdown: watch::Receiver<bool>,
    _place: Place<TenantId>,
}

/// What ends a wait.
enum Woken {
    Changed,
    Silent,
    Stopping,
}

/// Opens the stream; a build that is not there is an error at once.
pub(super) async fn follow(
    state: Arc<ApiState>,
    reader: Reader,
    wish: Wish,
) -> Result<
    impl Stream<Item = Result<v1::StreamBuildLogsResponse, ConnectError>> + Send + use<>,
    Answer,
> {
    let place = state.open.logs.take(reader.who.tenant())?;
    let mut follower = Follower {
        // Before the first look, so that nothing falls between.
        changes: state.service.changes(),
        shutdown: state.stopped.clone(),
        state,
        reader,
        checked: Instant::now(),
        wish,
        lines: VecDeque::new(),
        is_end: false,
        last_sent: Instant::now(),
        _place: place,
    };
    follower.read().await?;
    Ok(stream::unfold(Some(follower), |follower| async {
        let mut follower = follower?;
        match follower.next().await {
            Ok(Some(message)) => Some((Ok(message), Some(follower))),
            Ok(None) => None,
            Err(answer) => {
                // One that is deleted while it is followed keeps nobody out.
                if answer.code() != ErrorCode::NotFound {
                    let (state, reader) = (&follower.state, &follower.reader);
                    state.refused(&reader.caller, None, &reader.claim.build, &answer);
                }
                Some((Err(answer.into_connect()), None))
            }
        }
    }))
}

impl Follower {
    /// Asks again who follows, if that is due.
    async fn recheck(&mut self) -> Result<(), Answer> {
        if self.checked.elapsed() >= RECHECK_EVERY {
            let Reader { caller, claim, .. } = &self.reader;
            self.reader.who = self.state.auth.recheck(caller, claim).await?;
            self.checked = Instant::now();
        }
        Ok(())
    }

    async fn read(&mut self) -> Result<(), Answer> {
        let (build, offset) = (&self.wish.build, self.wish.offset);
        let LogPage { mut lines, next_offset, is_end } =
            self.state.service.log(&self.reader.who, build, offset, PAGE_LINES).await?;
        let is_whole = u32::try_from(lines.len()).is_ok_and(|count| count < PAGE_LINES);
        (self.is_end, self.wish.offset) = match fitting(&lines) {
            count if count == lines.len() => {
                (is_end || (is_whole && !self.wish.follow), next_offset)
            }
            count => {
                let next_offset = lines[count].offset;
                lines.truncate(count);
                (false, next_offset)
            }
        };
        self.lines = lines.into();
        Ok(())
    }

    async fn next(&mut self) -> Result<Option<v1::StreamBuildLogsResponse>, Answer> {
        loop {
            self.recheck().await?;
            if let Some(line) = self.lines.pop_front() {
                self.last_sent = Instant::now();
                return Ok(Some(convert::log_message(&line)));
            }
            if self.is_end {
                return Ok(None);
            }
            self.read().await?;
            if !self.lines.is_empty() || self.is_end {
                continue;
            }
            match self.wait().await {
                Woken::Changed => {}
                Woken::Silent => {
                    self.last_sent = Instant::now();
                    return Ok(Some(self.heartbeat()));
                }
                Woken::Stopping => return Err(ServiceError::Stopping.into()),
            }
        }
    }

    /// The only place that waits.
    async fn wait(&mut self) -> Woken {
        if *self.shutdown.borrow() {
            return Woken::Stopping;
        }
        let recheck = RECHECK_EVERY.saturating_sub(self.checked.elapsed());
        let silence = self.wish.heartbeat.map(|silence| self.last_sent + silence);
        let silent = async {
            match silence {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // A sender that is gone means that the service goes, too.
            _ = self.shutdown.changed() => Woken::Stopping,
            () = silent => Woken::Silent,
            () = self.changes.wait(LOOK_EVERY.min(recheck)) => Woken::Changed,
        }
    }

    fn heartbeat(&self) -> v1::StreamBuildLogsResponse {
        v1::StreamBuildLogsResponse {
            offset: convert::signed(self.wish.offset),
            heartbeat: true,
            ..Default::default()
        }
    }
}

/// How many of the lines, from the first, are kept; the first is, however long it is.
fn fitting(lines: &[LogLine]) -> usize {
    let mut bytes = 0;
    let fits = |(place, line): &(usize, &LogLine)| {
        bytes += line.message.len();
        *place == 0 || bytes <= PAGE_BYTES
    };
    lines.iter().enumerate().take_while(fits).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::record::Micros;

    #[test]
    fn a_follower_keeps_so_many_bytes_and_always_one_line() {
        let lines = |bytes: &[usize]| -> Vec<LogLine> {
            let line = |bytes: &usize| LogLine {
                offset: 0,
                at: Micros(0),
                level: "info".into(),
                component: "builder".into(),
                message: "x".repeat(*bytes),
            };
            bytes.iter().map(line).collect()
        };
        assert_eq!(fitting(&lines(&[])), 0);
        assert_eq!(fitting(&lines(&[1; 200])), 200);
        assert_eq!(fitting(&lines(&[PAGE_BYTES + 1, 0, 0])), 1);
        assert_eq!(fitting(&lines(&[PAGE_BYTES / 2, PAGE_BYTES / 2, 1])), 2);
    }
}
