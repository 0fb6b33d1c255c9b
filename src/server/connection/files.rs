//! How many connections the limit on open files leaves room for.

/// Files that a server has open beside its connections, with some to spare: standard
/// streams, the listener, event queues, model files, a log, a collector of spans.
const RESERVE: usize = 64;

/// As many connections as are `wanted` and as the process may have files open for. Where
/// the limit is very low, half of it is reserved.
pub(super) fn limit(wanted: usize) -> usize {
    let Some(files) = open_files() else {
        return wanted.max(1);
    };
    let room = files - RESERVE.min(files / 2);
    if room < wanted {
        tracing::info!(
            connections = room,
            files,
            "connections are limited by the number of files that the process may open"
        );
    }
    wanted.min(room).max(1)
}

/// The soft limit on open files (`RLIMIT_NOFILE`), if there is one.
#[cfg(unix)]
fn open_files() -> Option<usize> {
    use rustix::process::{Resource, getrlimit};
    let limit = getrlimit(Resource::Nofile).current?;
    usize::try_from(limit).ok()
}

#[cfg(not(unix))]
fn open_files() -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use super::{RESERVE, limit, open_files};

    #[test]
    fn connections_leave_room_for_other_files() {
        let files = open_files().expect("the tests run with a limit");
        assert_eq!(limit(usize::MAX), files - RESERVE.min(files / 2));
        assert_eq!(limit(1), 1);
        assert_eq!(limit(0), 1);
    }
}
