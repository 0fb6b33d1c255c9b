//! The deadlines of all open requests, in one ordered set per engine. A deadline is removed as
//! soon as it no longer applies.

use crate::schedule::SequenceKey;
use std::collections::BTreeSet;
use std::time::Instant;

/// What a request has failed to do in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    /// Produce its first token.
    FirstToken,
    /// End.
    Finish,
    /// Have its reader catch up while it was paused.
    CatchUp,
}

/// The deadlines of one request. `None` means that it has no such deadline.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RequestDeadlines {
    pub first_token: Option<Instant>,
    pub finish: Option<Instant>,
    pub catch_up: Option<Instant>,
}

impl RequestDeadlines {
    fn of(&mut self, due: Due) -> &mut Option<Instant> {
        match due {
            Due::FirstToken => &mut self.first_token,
            Due::Finish => &mut self.finish,
            Due::CatchUp => &mut self.catch_up,
        }
    }
}

/// The deadlines of all open requests, earliest first.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    set: BTreeSet<(Instant, SequenceKey, Due)>,
}

impl Deadlines {
    /// Returns the earliest deadline.
    pub fn next(&self) -> Option<Instant> {
        self.set.first().map(|(at, _, _)| *at)
    }

    /// Returns the earliest deadline, if it has passed at `now`.
    pub fn overdue(&self, now: Instant) -> Option<(SequenceKey, Due)> {
        let (at, key, due) = self.set.first()?;
        (*at <= now).then_some((*key, *due))
    }

    /// Sets or, with `None`, clears one deadline of a request.
    pub fn set(
        &mut self,
        key: SequenceKey,
        request: &mut RequestDeadlines,
        due: Due,
        at: Option<Instant>,
    ) {
        let slot = request.of(due);
        if let Some(before) = std::mem::replace(slot, at) {
            self.set.remove(&(before, key, due));
        }
        if let Some(at) = at {
            self.set.insert((at, key, due));
        }
    }

    /// Adds all deadlines of a new request.
    pub fn add(&mut self, key: SequenceKey, mut request: RequestDeadlines) -> RequestDeadlines {
        for due in [Due::FirstToken, Due::Finish, Due::CatchUp] {
            if let Some(at) = *request.of(due) {
                self.set.insert((at, key, due));
            }
        }
        request
    }

    /// Removes all deadlines of a request.
    pub fn remove(&mut self, key: SequenceKey, mut request: RequestDeadlines) {
        for due in [Due::FirstToken, Due::Finish, Due::CatchUp] {
            self.set(key, &mut request, due, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slotmap::SlotMap;
    use std::time::Duration;

    #[test]
    fn the_earliest_deadline_comes_first_and_a_removed_request_leaves_none() {
        let mut keys: SlotMap<SequenceKey, ()> = SlotMap::with_key();
        let (a, b) = (keys.insert(()), keys.insert(()));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut deadlines = Deadlines::default();
        let mut of_a = deadlines.add(
            a,
            RequestDeadlines {
                first_token: Some(at(3)),
                finish: Some(at(9)),
                catch_up: None,
            },
        );
        // The same moment as a deadline of the other request: both must be kept.
        let of_b = deadlines.add(
            b,
            RequestDeadlines {
                first_token: None,
                finish: Some(at(3)),
                catch_up: None,
            },
        );
        assert_eq!(deadlines.next(), Some(at(3)));
        assert_eq!(deadlines.overdue(at(2)), None);
        deadlines.set(a, &mut of_a, Due::FirstToken, None);
        assert_eq!(deadlines.overdue(at(3)), Some((b, Due::Finish)));
        deadlines.set(a, &mut of_a, Due::CatchUp, Some(at(1)));
        assert_eq!(deadlines.overdue(at(3)), Some((a, Due::CatchUp)));
        deadlines.remove(a, of_a);
        deadlines.remove(b, of_b);
        assert_eq!(deadlines.next(), None);
        assert_eq!(deadlines.set.len(), 0);
    }
}
