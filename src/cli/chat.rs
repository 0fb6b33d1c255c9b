//! `quell chat`: talks with a model in the terminal, one answer at a time.
//!
//! Ctrl-C during an answer stops it and frees its cache blocks before the next prompt
//! appears. At the prompt, Ctrl-C ends the program. If stdin or stdout is not a terminal,
//! each line of stdin is a message.

mod lines;

use super::args::{ModelArgs, SamplingArgs};
use super::error::CliError;
use crate::{
    Chunk, Engine, GenerateError, Message, Outcome, Request, SamplingParams, SubmitError,
    TextError, TokenStream,
};
use clap::Args;
use futures_core::Stream;
use lines::{Lines, stream_lines, terminal_editor};
use std::borrow::Cow;
use std::io::{self, ErrorKind, IsTerminal as _, Write as _};
use std::pin::Pin;
use std::time::{Duration, Instant};

const HELP: &str = "\
/help          shows this
/reset         forgets the conversation, but not the system message
/stats         shows the use of the cache, and how requests ended
/system TEXT   sets the system message; without TEXT, removes it
Ctrl-C         stops an answer; at the prompt, leaves
Ctrl-D         leaves";

/// Talk with a model in the terminal.
#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// System message of the conversation.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// Maximum number of tokens per answer [default: the model's own, else up to the context
    /// limit].
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs the subcommand.
pub fn start(args: ChatArgs) -> Result<(), CliError> {
    // Report invalid settings before the model is loaded.
    args.sampling.params(&SamplingParams::default(), None)?;
    if args.max_tokens == Some(0) {
        return Err(CliError::Usage(
            "--max-tokens is 0, but must be at least 1".to_owned(),
        ));
    }
    // The conversation is the only sequence.
    let engine = args.model.start(1)?;
    let mut defaults = engine.sampling_defaults();
    defaults.temperature = defaults.temperature.or(Some(0.7));
    let options = ChatOptions {
        system: args.system,
        sampling: args.sampling.params(&defaults.params(), None)?,
        max_tokens: args.max_tokens.or(defaults.max_tokens),
    };
    run(engine, options)
}

/// Settings of a chat.
#[derive(Clone, Debug)]
pub struct ChatOptions {
    /// The system message, if any.
    pub system: Option<String>,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// Maximum number of tokens per answer; up to the context limit if `None`.
    pub max_tokens: Option<usize>,
}

/// Runs the chat until the user leaves.
pub fn run(engine: Engine, options: ChatOptions) -> Result<(), CliError> {
    if engine
        .tokenizer()
        .and_then(|tokenizer| tokenizer.chat_template())
        .is_none()
    {
        return Err(CliError::NoTemplate);
    }
    options
        .sampling
        .validate(engine.info().vocabulary)
        .map_err(SubmitError::from)?;
    if options.max_tokens == Some(0) {
        return Err(SubmitError::NoTokens.into());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::Runtime)?;
    let mut chat = Chat {
        engine,
        sampling: options.sampling,
        max_tokens: options.max_tokens,
        conversation: Conversation {
            system: options.system,
            turns: Vec::new(),
        },
        last: None,
        style: Style::of_terminal(),
    };
    match runtime.block_on(chat.talk()) {
        // The reader of stdout, such as `head`, has closed it. This is not a failure.
        Err(CliError::Output(error)) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// The conversation so far.
#[derive(Debug, Default)]
struct Conversation {
    system: Option<String>,
    /// Messages of the user and the assistant, alternating.
    turns: Vec<Message>,
}

impl Conversation {
    /// Returns all messages in the order that the chat template expects.
    fn messages(&self) -> Vec<Message> {
        let system = self
            .system
            .iter()
            .map(|text| Message::new("system", text.as_str()));
        system.chain(self.turns.iter().cloned()).collect()
    }

    fn ask(&mut self, question: &str) {
        self.turns.push(Message::new("user", question));
    }

    /// Adds the answer to the last question. If the answer is empty, removes the question,
    /// because chat templates require alternating messages.
    fn answer(&mut self, answer: String) {
        if answer.is_empty() {
            self.turns.pop();
        } else {
            self.turns.push(Message::new("assistant", answer));
        }
    }
}

/// A parsed line of input.
#[derive(Debug, PartialEq)]
enum Input<'a> {
    Nothing,
    Say(&'a str),
    Help,
    Reset,
    Stats,
    System(Option<&'a str>),
    Unknown(&'a str),
}

impl<'a> Input<'a> {
    fn parse(line: &'a str) -> Self {
        let line = line.trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match (word, rest.trim()) {
            ("", _) => Self::Nothing,
            ("/help", "") => Self::Help,
            ("/reset", "") => Self::Reset,
            ("/stats", "") => Self::Stats,
            ("/system", text) => Self::System(Some(text).filter(|text| !text.is_empty())),
            _ if line.starts_with('/') => Self::Unknown(line),
            _ => Self::Say(line),
        }
    }
}

/// Timing of one answer.
#[derive(Clone, Copy, Debug)]
struct Pace {
    submitted: Instant,
    first: Option<Instant>,
    last: Instant,
    tokens: usize,
}

impl Pace {
    fn start() -> Self {
        let now = Instant::now();
        Self {
            submitted: now,
            first: None,
            last: now,
            tokens: 0,
        }
    }

    fn tokens(&mut self, count: usize) {
        if count > 0 {
            self.last = Instant::now();
            self.first.get_or_insert(self.last);
            self.tokens += count;
        }
    }

    fn first_token(&self) -> Option<Duration> {
        Some(self.first? - self.submitted)
    }

    /// Returns tokens per second after the first token.
    fn rate(&self) -> Option<f64> {
        let seconds = (self.last - self.first?).as_secs_f64();
        (self.tokens > 1 && seconds > 0.0).then(|| (self.tokens - 1) as f64 / seconds)
    }
}

impl std::fmt::Display for Pace {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} tokens", self.tokens)?;
        if let Some(rate) = self.rate() {
            write!(formatter, ", {rate:.1} tok/s")?;
        }
        match self.first_token() {
            Some(time) => write!(formatter, ", first token after {:.3} s", time.as_secs_f64()),
            None => Ok(()),
        }
    }
}

/// Which streams are terminals, and whether they may have colours.
#[derive(Clone, Copy, Debug)]
struct Style {
    /// Both stdin and stdout are terminals.
    interactive: bool,
    /// Stdout is a terminal.
    terminal_output: bool,
    /// The prompt may be bold.
    bold: bool,
    /// Notes may be dim.
    dim: bool,
}

impl Style {
    fn of_terminal() -> Self {
        let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let terminal_output = io::stdout().is_terminal();
        Self {
            interactive: io::stdin().is_terminal() && terminal_output,
            terminal_output,
            bold: colour && terminal_output,
            dim: colour && io::stderr().is_terminal(),
        }
    }

    /// Writes a note to stderr and ignores errors.
    fn note(self, text: &str) {
        let (start, end) = if self.dim {
            ("\x1b[2m", "\x1b[0m")
        } else {
            ("", "")
        };
        let _ = writeln!(io::stderr(), "{start}{text}{end}");
    }
}

struct Chat {
    engine: Engine,
    sampling: SamplingParams,
    max_tokens: Option<usize>,
    conversation: Conversation,
    last: Option<Pace>,
    style: Style,
}

impl Chat {
    async fn talk(&mut self) -> Result<(), CliError> {
        let mut lines = if self.style.interactive {
            self.style
                .note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.");
            Lines::Terminal(Box::new(terminal_editor(self.style.bold)?))
        } else {
            Lines::Stream(stream_lines()?)
        };
        while let Some(line) = lines.next().await? {
            match Input::parse(&line) {
                Input::Nothing => {}
                Input::Say(question) => self.turn(question).await?,
                Input::Help => print(HELP)?,
                Input::Stats => self.show_stats()?,
                Input::Reset => {
                    self.conversation.turns.clear();
                    self.style.note("(conversation reset)");
                }
                Input::System(text) => {
                    self.conversation.system = text.map(str::to_owned);
                    let done = if text.is_some() { "set" } else { "removed" };
                    self.style.note(&format!("(system message {done})"));
                }
                Input::Unknown(command) => {
                    self.style
                        .note(&format!("unknown command '{command}'; see /help"));
                }
            }
        }
        Ok(())
    }

    /// Asks one question and shows its answer.
    async fn turn(&mut self, question: &str) -> Result<(), CliError> {
        self.conversation.ask(question);
        let mut request = Request::new(self.conversation.messages());
        request.sampling = self.sampling.clone();
        request.max_tokens = self.max_tokens;
        let answer = match self.engine.generate(request) {
            Ok(stream) => self.answer(stream).await?,
            Err(error) => {
                self.refused(error)?;
                String::new()
            }
        };
        self.conversation.answer(answer);
        Ok(())
    }

    /// Tells the user why a question was refused. Returns errors that another question
    /// would not avoid.
    fn refused(&self, error: SubmitError) -> Result<(), CliError> {
        match error {
            SubmitError::PromptTooLong { .. } => {
                self.style
                    .note(&format!("{error}; /reset forgets the conversation"));
            }
            SubmitError::Text(TextError::TemplateRaised { .. })
                if self.conversation.system.is_some() =>
            {
                self.style
                    .note(&format!("{error}; /system removes the system message"));
            }
            SubmitError::Text(_) | SubmitError::Overloaded { .. } => {
                self.style.note(&error.to_string());
            }
            fatal => return Err(fatal.into()),
        }
        Ok(())
    }

    /// Shows an answer as it arrives, until it ends or Ctrl-C is pressed, and returns its
    /// text.
    async fn answer(&mut self, mut stream: TokenStream) -> Result<String, CliError> {
        let mut answer = String::new();
        let mut pace = Pace::start();
        let mut interrupt = std::pin::pin!(tokio::signal::ctrl_c());
        let note = loop {
            let next = std::future::poll_fn(|context| Pin::new(&mut stream).poll_next(context));
            let chunk = tokio::select! {
                biased;
                interrupted = &mut interrupt => {
                    interrupted.map_err(CliError::Runtime)?;
                    break Some(stopped(stream).await?);
                }
                chunk = next => chunk,
            };
            let Some(chunk) = chunk.transpose().or_else(failed)? else {
                break None;
            };
            pace.tokens(chunk.tokens.len());
            show(&chunk, self.style.terminal_output)?;
            answer.push_str(&chunk.text);
            if let Some(finish) = chunk.finish {
                break match finish.outcome {
                    Outcome::Stop => None,
                    Outcome::Length => Some(format!("(cut at {} tokens)", finish.generated_tokens)),
                    Outcome::Cancelled(reason) => Some(format!("(cut: {})", reason.as_str())),
                };
            }
        };
        print("")?;
        if let Some(note) = note {
            self.style.note(&note);
        }
        self.last = Some(pace);
        Ok(answer)
    }

    fn show_stats(&self) -> Result<(), CliError> {
        let stats = self.engine.stats()?;
        let (blocks, outcomes) = (stats.blocks, stats.outcomes);
        let last = self
            .last
            .map_or_else(|| "none yet".to_owned(), |pace| pace.to_string());
        print(&format!(
            "blocks       {} used, {} kept for reuse, {} free of {}, {} tokens each\n\
             tokens       {} of prompts, {} generated\n\
             requests     {} accepted: {} stopped, {} cut at a limit, {} cancelled, {} failed\n\
             last answer  {last}",
            blocks.referenced + blocks.deferred,
            blocks.cached,
            blocks.free,
            blocks.total,
            stats.block_tokens,
            stats.prompt_tokens,
            stats.tokens_generated,
            outcomes.accepted,
            outcomes.stopped,
            outcomes.length,
            outcomes.cancelled,
            outcomes.failed,
        ))
    }
}

/// Cancels an answer and waits until its blocks are free.
async fn stopped(stream: TokenStream) -> Result<String, CliError> {
    match stream.cancel().await {
        Ok(receipt) => {
            let plural = if receipt.blocks_freed == 1 { "" } else { "s" };
            Ok(format!(
                "(stopped; {} block{plural} freed)",
                receipt.blocks_freed
            ))
        }
        Err(fault) => Err(CliError::Closed(fault)),
    }
}

/// Handles a failed answer. The next one may succeed unless the engine has closed.
fn failed(error: GenerateError) -> Result<Option<Chunk>, CliError> {
    match error {
        GenerateError::Closed(fault) | GenerateError::Failed(fault) => Err(CliError::Closed(fault)),
        // The request was cancelled elsewhere. Keep the text that has arrived.
        _ => Ok(None),
    }
}

/// Writes the next piece of an answer. On a terminal, control characters are left out.
fn show(chunk: &Chunk, terminal: bool) -> Result<(), CliError> {
    let text = if terminal {
        printable(&chunk.text)
    } else {
        Cow::Borrowed(&*chunk.text)
    };
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(CliError::Output)
}

fn printable(text: &str) -> Cow<'_, str> {
    let steers = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if text.contains(steers) {
        Cow::Owned(text.replace(steers, ""))
    } else {
        Cow::Borrowed(text)
    }
}

fn print(text: &str) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")
        .and_then(|()| stdout.flush())
        .map_err(CliError::Output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_or_commands() {
        assert_eq!(Input::parse("  "), Input::Nothing);
        assert_eq!(Input::parse(" hello there "), Input::Say("hello there"));
        assert_eq!(Input::parse("/stats "), Input::Stats);
        assert_eq!(
            Input::parse("/system  be brief "),
            Input::System(Some("be brief"))
        );
        assert_eq!(Input::parse("/system"), Input::System(None));
        assert_eq!(Input::parse("/what now"), Input::Unknown("/what now"));
        assert_eq!(Input::parse("/reset it"), Input::Unknown("/reset it"));
    }

    #[test]
    fn an_empty_answer_takes_its_question_along() {
        let mut conversation = Conversation {
            system: Some("s".to_owned()),
            turns: Vec::new(),
        };
        conversation.ask("one");
        conversation.answer(String::new());
        assert_eq!(conversation.messages(), [Message::new("system", "s")]);
        conversation.ask("two");
        conversation.answer("half an ans".to_owned());
        let roles: Vec<_> = conversation
            .messages()
            .into_iter()
            .map(|said| said.role)
            .collect();
        assert_eq!(roles, ["system", "user", "assistant"]);
    }

    #[test]
    fn nothing_in_an_answer_steers_the_terminal() {
        assert_eq!(printable("a\tb\n"), "a\tb\n");
        assert_eq!(printable("a\x1b[2Jb\r\u{9b}c"), "a[2Jbc");
    }
}
