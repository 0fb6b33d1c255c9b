//! Progress bars, shown only on a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;

/// Returns whether progress can be shown.
pub fn on_terminal() -> bool {
    std::io::stderr().is_terminal()
}

/// Creates a bar of `total` steps on stderr, hidden if stderr is not a terminal.
pub fn bar(total: u64, message: &'static str) -> ProgressBar {
    let target = if on_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(total), target).with_message(message);
    if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}
