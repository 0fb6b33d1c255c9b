//! Tokenizes the prompts of a request, checks their lengths, and submits them to the engine.

use super::App;
use super::error::ApiError;
use super::http::auth::Caller;
use super::http::workers::Job;
use super::openai::session_turn::SessionTurn;
use crate::engine::{CancelReason, Places, Prompt, Request, SubmitError, TokenStream};
use crate::text::EncodeOptions;
use std::sync::Arc;

/// Maximum number of tokens in all prompts of a request together, where a prompt counts once
/// per answer to it. Every answer keeps its prompt's tokens, so this bounds the memory of a
/// request.
const MAX_BATCH_TOKENS: usize = 4 << 20;

impl App {
    /// Submits `prompts` for a caller, each for `samples` answers with the settings of
    /// `request`. The streams are in the order of the prompts, with all answers to a prompt
    /// together. Dropping a stream cancels its answer as after a disconnect.
    pub(super) async fn submit(
        self: &Arc<Self>,
        caller: &Caller,
        mut request: Request,
        prompts: Vec<Prompt>,
        samples: usize,
    ) -> Result<Vec<TokenStream>, ApiError> {
        caller.admit(&mut request);
        if let (Some(tokens), None) = (request.max_tokens, request.truncate_prompt) {
            for prompt in &prompts {
                self.check_length(prompt, tokens)?;
            }
        }
        // Reserve places before processing the prompts, so that a request that is refused for
        // lack of room costs nothing.
        let places = self.engine.places(prompts.len(), samples)?;
        let bytes = prompts.iter().map(text_bytes).sum();
        let app = Arc::clone(self);
        let work = move |job: &Job| app.submit_blocking(job, places, request, prompts, samples);
        self.workers.run_if_long(bytes, work).await
    }

    /// Like [`App::submit`], but submits a turn if there is a session. A turn has one prompt
    /// and one answer.
    pub(super) async fn submit_turn(
        self: &Arc<Self>,
        caller: &Caller,
        session: Option<SessionTurn>,
        mut request: Request,
        mut prompts: Vec<Prompt>,
        samples: usize,
    ) -> Result<Vec<TokenStream>, ApiError> {
        let Some(SessionTurn { id, prompt: kind }) = session else {
            return self.submit(caller, request, prompts, samples).await;
        };
        let (Some(prompt), 0, 1) = (prompts.pop(), prompts.len(), samples) else {
            let problem = "a session answers one prompt at a time, with n = 1";
            return Err(ApiError::invalid(problem).param("session_id"));
        };
        caller.admit(&mut request);
        let session = self.sessions.use_own(caller, &id)?;
        self.check_bytes(&prompt)?;
        let bytes = text_bytes(&prompt);
        request.prompt = prompt;
        self.limit_answer(&mut request);
        let turn = move |_: &Job| Ok(session.turn(request, kind)?);
        let stream: TokenStream = self.workers.run_if_long(bytes, turn).await?;
        Ok(vec![stream.when_dropped(CancelReason::Disconnect)])
    }

    fn submit_blocking(
        &self,
        job: &Job,
        places: Places,
        mut request: Request,
        prompts: Vec<Prompt>,
        samples: usize,
    ) -> Result<Vec<TokenStream>, ApiError> {
        let mut tokenized = Vec::with_capacity(prompts.len());
        let mut total = 0;
        for prompt in prompts {
            let mut tokens = match prompt {
                Prompt::Tokens(tokens) => tokens,
                prompt => {
                    job.check()?;
                    if request.truncate_prompt.is_none() {
                        self.check_bytes(&prompt)?;
                    }
                    self.engine.tokenize(&prompt)?
                }
            };
            if let Some(truncation) = request.truncate_prompt {
                truncation.cut(&mut tokens);
            }
            if let Some(most) = request.max_tokens {
                self.check_answer(tokens.len(), most)?;
            }
            total += tokens.len();
            if total.saturating_mul(samples) > MAX_BATCH_TOKENS {
                let problem = format!(
                    "the prompts have more than {MAX_BATCH_TOKENS} tokens, counted once for \
                     each of the {samples} answers to a prompt; send fewer at a time"
                );
                return Err(ApiError::invalid(problem).param("prompt"));
            }
            tokenized.push(tokens);
        }
        self.limit_answer(&mut request);
        let streams = self
            .engine
            .generate_in(places, request, tokenized, samples)?;
        let owned = |stream: TokenStream| stream.when_dropped(CancelReason::Disconnect);
        Ok(streams.into_iter().map(owned).collect())
    }

    /// Limits an answer whose request sets no limit to as many tokens as the model's own settings
    /// say, if they do. Unlike a limit that a client sets, this one may exceed the context's
    /// room, and gives way to a minimum.
    fn limit_answer(&self, request: &mut Request) {
        if request.max_tokens.is_none() {
            let limit = self.engine.sampling_defaults().max_tokens;
            request.max_tokens = limit.map(|limit| limit.max(request.limits.min_tokens));
        }
    }

    /// Returns the tokens of each prompt, in order. With `bare`, text prompts get none of the
    /// special tokens that the tokenizer puts around a text. With `cut`, prompts may be longer
    /// than the context, because they are truncated later.
    pub(super) async fn tokenize_all(
        self: &Arc<Self>,
        prompts: Vec<Prompt>,
        bare: bool,
        cut: bool,
    ) -> Result<Vec<Vec<u32>>, ApiError> {
        let bytes = prompts.iter().map(text_bytes).sum();
        let app = Arc::clone(self);
        let tokenize = move |job: &Job| {
            let each = prompts.into_iter().map(|prompt| match prompt {
                Prompt::Tokens(tokens) => Ok(tokens),
                prompt => {
                    job.check()?;
                    if !cut {
                        app.check_bytes(&prompt)?;
                    }
                    match prompt {
                        Prompt::Text(text) if bare => app.tokenize_bare(&text),
                        prompt => Ok(app.engine.tokenize(&prompt)?),
                    }
                }
            });
            each.collect()
        };
        self.workers.run_if_long(bytes, tokenize).await
    }

    /// Refuses a text that has more bytes than the tokens of a whole context can stand for.
    /// This needs no tokenization.
    fn check_bytes(&self, prompt: &Prompt) -> Result<(), ApiError> {
        self.check_text_bytes(text_bytes(prompt))
    }

    /// Like [`App::check_bytes`], for a text of `bytes` bytes.
    pub(super) fn check_text_bytes(&self, bytes: usize) -> Result<(), ApiError> {
        let limit = self.engine.max_sequence_tokens();
        let per_token = self
            .engine
            .tokenizer()
            .and_then(|tokenizer| tokenizer.max_token_bytes());
        let most = per_token.map_or(usize::MAX, |most| limit.saturating_mul(most));
        if bytes <= most {
            return Ok(());
        }
        let problem = format!(
            "the prompt has {bytes} bytes, which are more tokens than the context has: this \
             model's maximum context length is {limit} tokens"
        );
        Err(ApiError::invalid(problem)
            .param("prompt")
            .code("context_length_exceeded"))
    }

    /// Tokenizes a text without special tokens around it.
    fn tokenize_bare(&self, text: &str) -> Result<Vec<u32>, ApiError> {
        let tokenizer = self.require_tokenizer("a text prompt")?;
        let options = EncodeOptions {
            add_special: false,
            parse_special: true,
        };
        let tokens = tokenizer.encode(text, options);
        tokens.map_err(|error| SubmitError::Text(error).into())
    }

    /// Refuses an answer that the context has no room for, if the prompt is given as tokens.
    /// Texts are checked once they are tokenized.
    fn check_length(&self, prompt: &Prompt, max_tokens: usize) -> Result<(), ApiError> {
        match prompt {
            Prompt::Tokens(tokens) => self.check_answer(tokens.len(), max_tokens),
            _ => Ok(()),
        }
    }

    /// Refuses an answer of `max_tokens` tokens to a prompt of `tokens` tokens if the context
    /// has no room for both.
    fn check_answer(&self, tokens: usize, max_tokens: usize) -> Result<(), ApiError> {
        let limit = self.engine.max_sequence_tokens();
        // The engine refuses a prompt that is too long by itself.
        if tokens >= limit || max_tokens <= limit - tokens {
            return Ok(());
        }
        let problem = format!(
            "this model's maximum context length is {limit} tokens; the prompt has {tokens} \
             tokens and max_tokens is {max_tokens}, {} together",
            tokens.saturating_add(max_tokens),
        );
        Err(ApiError::invalid(problem)
            .param("max_tokens")
            .code("context_length_exceeded"))
    }
}

/// Returns the number of bytes of a prompt that must be tokenized.
fn text_bytes(prompt: &Prompt) -> usize {
    match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Tokens(_) => 0,
        Prompt::Chat(messages) | Prompt::Conversation { messages, .. } => {
            messages.iter().map(|message| message.content.len()).sum()
        }
    }
}
