//! Limits the number of connections to what the limit on open files leaves room for.

/// Number of files that a server opens in addition to its connections, with some to spare:
/// standard streams, listener, event queues, model files, log, trace exporter.
const RESERVE: usize = 64;

/// Returns the number of connections: `wanted`, or fewer if the process may not open that many
/// files. If the limit on open files is very low, half of it is reserved for other files.
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

/// Returns the soft limit on open files (`RLIMIT_NOFILE`), if there is one.
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
