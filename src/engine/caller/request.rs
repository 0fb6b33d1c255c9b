//! [`Request`]: a prompt, and everything that decides its answer.

use crate::engine::sync::Arc;
use crate::sampling::{Constraint, SamplingParams, TokenLimits};
use crate::schedule::Task;
use crate::text::{Message, RenderOptions};
use std::time::Duration;

/// A prompt to continue.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Prompt {
    /// Raw text. The names of special tokens in it are read as these tokens.
    Text(String),
    /// Token ids. They are shared, not copied, on their way to the scheduler thread.
    Tokens(Arc<[u32]>),
    /// A conversation, rendered with the model's own chat template.
    Chat(Vec<Message>),
    /// A conversation, rendered with the model's own chat template and further inputs of the
    /// template.
    Conversation {
        /// The conversation.
        messages: Vec<Message>,
        /// Further inputs of the template: tools and variables.
        options: RenderOptions,
    },
}

/// Which part of a prompt to keep. A shorter prompt is kept as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truncation {
    /// Keep this many tokens from the beginning.
    First(usize),
    /// Keep this many tokens from the end.
    Last(usize),
}

impl Truncation {
    /// Returns the part of a prompt's tokens that is kept.
    pub fn cut(self, prompt: &[u32]) -> &[u32] {
        match self {
            Self::First(tokens) => &prompt[..tokens.min(prompt.len())],
            Self::Last(tokens) => &prompt[prompt.len().saturating_sub(tokens)..],
        }
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(tokens: Vec<u32>) -> Self {
        Self::Tokens(tokens.into())
    }
}

impl From<&[u32]> for Prompt {
    fn from(tokens: &[u32]) -> Self {
        Self::Tokens(tokens.into())
    }
}

impl From<Arc<[u32]>> for Prompt {
    fn from(tokens: Arc<[u32]>) -> Self {
        Self::Tokens(tokens)
    }
}

impl From<Vec<Message>> for Prompt {
    fn from(messages: Vec<Message>) -> Self {
        Self::Chat(messages)
    }
}

/// A request to generate an answer.
///
/// Create it with [`Request::new`]: fields are added in minor releases.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt to continue.
    pub prompt: Prompt,
    /// Maximum number of new tokens. If `None`, only the context limit applies. Use 0 to score
    /// only the prompt, together with [`Request::prompt_logprobs`].
    pub max_tokens: Option<usize>,
    /// Which part of the prompt to keep. If `None`, all of it is kept.
    pub truncate_prompt: Option<Truncation>,
    /// If set, reports the log probability of each token of the prompt after the first, under
    /// the unmodified logits, and this many of the likeliest tokens at its position (see
    /// [`Chunk::prompt_logprobs`](crate::Chunk::prompt_logprobs)). The whole prompt is then
    /// computed, even the part that the cache holds, with at most `max_sequences` of its tokens
    /// per step.
    pub prompt_logprobs: Option<u32>,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// Strings that end the answer. They are not part of its text unless
    /// [`Request::include_stop`] is set.
    pub stop: Vec<String>,
    /// Tokens that end the answer in addition to the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Whether to continue after the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Whether special tokens are part of the answer's text, except the one that ends it. Some
    /// models mark tool calls and reasoning with such tokens.
    pub keep_special: bool,
    /// Special tokens that are part of the answer's text although
    /// [`Request::keep_special`] is not set, such as the marks of tool calls.
    pub kept_tokens: Vec<u32>,
    /// Whether the stop string or stop token that ends the answer is part of its text.
    pub include_stop: bool,
    /// Which tokens the answer may contain, and how many it must have.
    pub limits: TokenLimits,
    /// Maximum time from the submission to the first token. After it, the request is cancelled
    /// as [`Deadline`](crate::CancelReason::Deadline).
    pub first_token_within: Option<Duration>,
    /// Maximum time from the submission to the end of the answer. After it, the request is
    /// cancelled as [`Deadline`](crate::CancelReason::Deadline).
    pub finish_within: Option<Duration>,
    /// Priority of the request. Lower numbers are served first and may preempt requests with
    /// higher ones; the default is 0.
    pub priority: i32,
    /// Tenant that the request belongs to. Among requests of equal priority, those of the
    /// tenant that has been served least start first.
    pub tenant: Option<Arc<str>>,
    /// Salt of the prefix cache. Requests with different salts never share blocks, so that
    /// neither the time to the first token nor the number of cached tokens reveals to one what
    /// another has sent. Requests whose salt is `None` share blocks with each other.
    /// A salt has from 1 to 1,024 bytes.
    pub cache_salt: Option<Arc<str>>,
    /// Constrains which tokens the answer may consist of, for example with a `Grammar`
    /// compiled for this engine's tokenizer. An answer that the constraint considers complete
    /// ends as a normal stop.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Label that the caller chooses for the request. The request's span and
    /// [`Engine::snapshot`](crate::Engine::snapshot) show it, and
    /// [`Engine::find`](crate::Engine::find) looks for it. Labels need not be unique.
    pub label: Option<Arc<str>>,
    /// Owner of the request, such as the number of a client. [`Engine::snapshot`] shows it, and
    /// [`Engine::find`] can be limited to the requests of one owner.
    ///
    /// [`Engine::find`]: crate::Engine::find
    /// [`Engine::snapshot`]: crate::Engine::snapshot
    pub owner: Option<u64>,
}

impl Request {
    /// Creates a request with default settings: sampling at temperature 1, up to the context
    /// limit.
    pub fn new(prompt: impl Into<Prompt>) -> Self {
        Self {
            prompt: prompt.into(),
            max_tokens: None,
            truncate_prompt: None,
            prompt_logprobs: None,
            sampling: SamplingParams::default(),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            keep_special: false,
            kept_tokens: Vec::new(),
            include_stop: false,
            limits: TokenLimits::default(),
            first_token_within: None,
            finish_within: None,
            priority: 0,
            tenant: None,
            cache_salt: None,
            constraint: None,
            label: None,
            owner: None,
        }
    }

    /// Sets the maximum number of new tokens.
    pub fn max_tokens(mut self, tokens: usize) -> Self {
        self.max_tokens = Some(tokens);
        self
    }

    /// Requests the log probabilities of the prompt, with this many of the likeliest tokens at
    /// each position.
    pub fn prompt_logprobs(mut self, top: u32) -> Self {
        self.prompt_logprobs = Some(top);
        self
    }

    /// Returns what the scheduler must compute for the request.
    pub(in crate::engine) fn task(&self) -> Task {
        let score = |top| Task::Score { top };
        self.prompt_logprobs.map_or(Task::Generate, score)
    }

    /// Sets how to choose tokens.
    pub fn sampling(mut self, sampling: SamplingParams) -> Self {
        self.sampling = sampling;
        self
    }

    /// Sets the maximum time from the submission to the first token.
    pub fn first_token_within(mut self, time: Duration) -> Self {
        self.first_token_within = Some(time);
        self
    }

    /// Sets the maximum time from the submission to the end of the answer.
    pub fn finish_within(mut self, time: Duration) -> Self {
        self.finish_within = Some(time);
        self
    }

    /// Sets the priority. Lower numbers are served first.
    pub fn priority(mut self, priority: i32) -> Self {
        self.priority = priority;
        self
    }

    /// Sets the tenant that the request belongs to.
    pub fn tenant(mut self, tenant: impl Into<Arc<str>>) -> Self {
        self.tenant = Some(tenant.into());
        self
    }

    /// Sets the salt of the prefix cache, as [`Request::cache_salt`] describes it.
    pub fn cache_salt(mut self, salt: impl Into<Arc<str>>) -> Self {
        self.cache_salt = Some(salt.into());
        self
    }

    /// Sets the constraint on the answer.
    pub fn constraint(mut self, constraint: impl Into<Box<dyn Constraint>>) -> Self {
        self.constraint = Some(constraint.into());
        self
    }

    /// Sets which tokens the answer may contain, and how many it must have.
    pub fn limits(mut self, limits: TokenLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets the label.
    pub fn label(mut self, label: impl Into<Arc<str>>) -> Self {
        self.label = Some(label.into());
        self
    }

    /// Sets the owner.
    pub fn owner(mut self, owner: u64) -> Self {
        self.owner = Some(owner);
        self
    }

    /// Sets the temperature. 0 chooses the likeliest token at each position.
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.sampling.temperature = temperature;
        self
    }

    /// Samples from this many of the likeliest tokens only; 0 means all.
    pub fn top_k(mut self, tokens: u32) -> Self {
        self.sampling.top_k = tokens;
        self
    }

    /// Samples from the likeliest tokens whose probabilities add up to this number only.
    pub fn top_p(mut self, probability: f32) -> Self {
        self.sampling.top_p = probability;
        self
    }

    /// Samples from tokens that are at least this fraction as likely as the likeliest only.
    pub fn min_p(mut self, fraction: f32) -> Self {
        self.sampling.min_p = fraction;
        self
    }

    /// Sets the penalty on tokens in the prompt or the answer; 1 means none.
    pub fn repetition_penalty(mut self, penalty: f32) -> Self {
        self.sampling.repetition_penalty = penalty;
        self
    }

    /// Sets the penalty on each token that the answer contains.
    pub fn presence_penalty(mut self, penalty: f32) -> Self {
        self.sampling.presence_penalty = penalty;
        self
    }

    /// Sets the penalty on each occurrence of a token in the answer.
    pub fn frequency_penalty(mut self, penalty: f32) -> Self {
        self.sampling.frequency_penalty = penalty;
        self
    }

    /// Adds a number to the logit of a token. May be called for any number of tokens.
    pub fn logit_bias(mut self, token: u32, bias: f32) -> Self {
        self.sampling.logit_bias.push((token, bias));
        self
    }

    /// Sets the seed of the random numbers. The same seed gives the same tokens, whatever else
    /// is in the batch.
    pub fn seed(mut self, seed: u64) -> Self {
        self.sampling.seed = seed;
        self
    }

    /// Asks for the log probability of each token of the answer, and this many of the likeliest
    /// tokens at its position.
    pub fn logprobs(mut self, top: u32) -> Self {
        self.sampling.logprobs = Some(top);
        self
    }

    /// Adds a string that ends the answer. May be called several times.
    pub fn stop(mut self, stop: impl Into<String>) -> Self {
        self.stop.push(stop.into());
        self
    }

    /// Adds a token that ends the answer, besides the model's own. May be called several times.
    pub fn stop_token(mut self, token: u32) -> Self {
        self.stop_token_ids.push(token);
        self
    }

    /// Continues past the model's end-of-sequence tokens.
    pub fn ignore_eos(mut self) -> Self {
        self.ignore_eos = true;
        self
    }

    /// Includes special tokens in the text of the answer, except the one that ends it.
    pub fn keep_special(mut self) -> Self {
        self.keep_special = true;
        self
    }

    /// Includes the stop string or stop token that ends the answer in its text.
    pub fn include_stop(mut self) -> Self {
        self.include_stop = true;
        self
    }

    /// Requires this many tokens before the model's end-of-sequence tokens or a stop string may
    /// end the answer.
    pub fn min_tokens(mut self, tokens: usize) -> Self {
        self.limits.min_tokens = tokens;
        self
    }

    /// Cuts a longer prompt.
    pub fn truncate_prompt(mut self, truncation: Truncation) -> Self {
        self.truncate_prompt = Some(truncation);
        self
    }

    /// Chooses the likeliest token at each position.
    pub fn greedy(mut self) -> Self {
        self.sampling.temperature = 0.0;
        self
    }
}
