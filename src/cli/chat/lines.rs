//! Lines of user input, typed at a prompt or read from a file or a pipe.

use crate::cli::error::CliError;
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::MemHistory;
use rustyline::validate::Validator;
use rustyline::{Config, Editor, Helper};
use std::borrow::Cow;
use std::io::{self, BufRead as _};
use tokio::sync::mpsc;

/// Source of the user's lines.
pub enum Lines {
    /// A person at a terminal, with line editing.
    Terminal(Box<Editor<PromptStyle, MemHistory>>),
    /// A file or a pipe.
    Stream(mpsc::Receiver<io::Result<String>>),
}

impl Lines {
    /// Returns the next line, or `None` when the user leaves.
    pub async fn next(&mut self) -> Result<Option<String>, CliError> {
        match self {
            // This blocks the thread, but nothing else runs on it while the user types.
            Self::Terminal(editor) => match editor.readline("> ") {
                Ok(line) => Ok(Some(line)),
                Err(ReadlineError::Interrupted | ReadlineError::Eof) => Ok(None),
                Err(error) => Err(CliError::Input(io_error(error))),
            },
            Self::Stream(lines) => tokio::select! {
                line = lines.recv() => line.transpose().map_err(CliError::Input),
                interrupted = tokio::signal::ctrl_c() => {
                    interrupted.map_err(CliError::Runtime)?;
                    Ok(None)
                }
            },
        }
    }
}

/// Reads stdin on a separate thread, so that Ctrl-C is noticed in the meantime.
pub fn stream_lines() -> Result<mpsc::Receiver<io::Result<String>>, CliError> {
    let (sender, lines) = mpsc::channel(1);
    let read = move || {
        for line in io::stdin().lock().lines() {
            let last = line.is_err();
            if sender.blocking_send(line).is_err() || last {
                return;
            }
        }
    };
    // The thread ends with stdin or with the process, so nobody joins it.
    let thread = std::thread::Builder::new()
        .name("quell-stdin".to_owned())
        .spawn(read);
    thread.map(|_| lines).map_err(CliError::Input)
}

/// Creates a line editor whose history covers only this run.
pub fn terminal_editor(bold: bool) -> Result<Editor<PromptStyle, MemHistory>, CliError> {
    let config = Config::builder().auto_add_history(true).build();
    let mut editor = Editor::with_history(config.clone(), MemHistory::with_config(&config))
        .map_err(|error| CliError::Input(io_error(error)))?;
    editor.set_helper(Some(PromptStyle { bold }));
    Ok(editor)
}

fn io_error(error: ReadlineError) -> io::Error {
    match error {
        ReadlineError::Io(error) => error,
        other => io::Error::other(other),
    }
}

/// Style of the prompt, as the line editor's helper.
pub struct PromptStyle {
    bold: bool,
}

impl Highlighter for PromptStyle {
    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(
        &'s self,
        prompt: &'p str,
        _default: bool,
    ) -> Cow<'b, str> {
        if self.bold {
            Cow::Owned(format!("\x1b[1m{prompt}\x1b[0m"))
        } else {
            Cow::Borrowed(prompt)
        }
    }
}

impl Completer for PromptStyle {
    type Candidate = String;
}

impl Hinter for PromptStyle {
    type Hint = String;
}

impl Validator for PromptStyle {}
impl Helper for PromptStyle {}
