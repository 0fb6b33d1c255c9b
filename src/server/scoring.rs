//! Scores how well documents answer a query, in the way that the model was made for.

use super::App;
use super::error::ApiError;
use super::http::auth::Caller;
use super::http::workers::{Job, Work};
use super::submit::{Length, Submission, Tokenization};
use crate::engine::{CancelReason, EmbedRequest, Embedding, Prompt, Request, SubmitError};
use crate::engine::{TokenStream, normalize};
use crate::sampling::{SamplingParams, TokenLimits};
use crate::text::{EncodeOptions, Message, RenderOptions, Tokenizer};
use axum::http::StatusCode;
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Largest number of texts of one request that are computed at a time, so that a request with many
/// texts does not fill the engine's queue.
const AT_ONCE: usize = 64;

/// Number of likeliest tokens among which the two answers of a generating model are looked up. An
/// answer that is not among them counts as likely as the last of them.
const LIKELIEST: u32 = 64;

/// How texts that are embedded become tokens.
const WITH_SPECIAL: Tokenization = Tokenization {
    add_special: true,
    length: Length::Context,
};

/// What a generating model is told about its answers. It is that of Qwen3-Reranker.
const SYSTEM: &str = "Judge whether the Document meets the requirements based on the Query and the \
                      Instruct provided. Note that the answer can only be \"yes\" or \"no\".";

/// What a generating model is asked for if the request does not say, as Qwen3-Reranker is.
const INSTRUCTION: &str =
    "Given a web search query, retrieve relevant passages that answer the query";

/// Texts to score, and for whom.
pub(super) struct Scoring {
    /// Pairs of a query and a document.
    pub pairs: Vec<(Arc<str>, String)>,
    /// What makes a document relevant, for models that take such a text.
    pub instruction: Option<String>,
    /// Maximum number of tokens of a document. The rest is left out.
    pub most_tokens: Option<usize>,
    /// The user, the priority and the salt of the request.
    pub template: EmbedRequest,
}

/// The scores of all pairs, in order, and what they took.
pub(super) struct Scores {
    pub scores: Vec<f32>,
    pub prompt_tokens: usize,
}

impl App {
    /// Embeds all inputs, some at a time, and returns the embeddings in order. If the future
    /// is dropped, the inputs in progress are cancelled as after a disconnect.
    pub(super) async fn embed_all(
        &self,
        inputs: Vec<Arc<[u32]>>,
        template: &EmbedRequest,
    ) -> Result<Vec<Embedding>, ApiError> {
        let begun = Instant::now();
        let embed = |tokens| {
            let request = EmbedRequest {
                prompt: Prompt::Tokens(tokens),
                finish_within: self.time_left(begun),
                ..template.clone()
            };
            let embedding = self.engine.embed(request);
            async move {
                let embedding = embedding?.when_dropped(CancelReason::Disconnect);
                embedding.await.map_err(ApiError::from)
            }
        };
        let all = stream::iter(inputs).map(embed);
        all.buffered(self.at_once()).try_collect().await
    }

    /// Scores pairs of a query and a document: with the classifier of a cross-encoder; by the cosine
    /// of their embeddings, if the model is one for embeddings; or else by how likely the model
    /// answers "yes".
    pub(super) async fn score(
        self: &Arc<Self>,
        caller: &Caller,
        scoring: Scoring,
    ) -> Result<Scores, ApiError> {
        let info = self.engine.info();
        let embeds = info.pooling.is_stated || !info.generates;
        if info.pooling.is_score {
            self.classify(scoring).await
        } else if embeds {
            self.compare(scoring).await
        } else {
            self.judge(caller, scoring).await
        }
    }

    /// Scores pairs with a classifier.
    async fn classify(self: &Arc<Self>, scoring: Scoring) -> Result<Scores, ApiError> {
        refuse_instruction(&scoring)?;
        let work = scoring.work();
        let Scoring {
            pairs,
            most_tokens,
            template,
            ..
        } = scoring;
        let app = Arc::clone(self);
        let tokenize = move |job: &Job| {
            let tokenizer = app.text_tokenizer()?;
            let each = pairs.into_iter().map(|(query, document)| {
                job.check()?;
                let document = shortened(tokenizer, document, most_tokens)?;
                app.check_texts([&*query, &document], Length::Context)?;
                let tokens = app.engine.pair_tokens(&query, &document)?;
                app.check_count(tokens.len())?;
                Ok(tokens.into())
            });
            each.collect::<Result<Vec<Arc<[u32]>>, ApiError>>()
        };
        let tokens = self.workers.run(work, tokenize).await?;
        let mut scores = Vec::with_capacity(tokens.len());
        let mut prompt_tokens = 0;
        for embedding in self.embed_all(tokens, &template).await? {
            prompt_tokens += embedding.prompt_tokens;
            // A classifier with several labels is refused when it is loaded.
            scores.push(finite(
                embedding.values.first().copied().unwrap_or(f32::NAN),
            )?);
        }
        Ok(Scores {
            scores,
            prompt_tokens,
        })
    }

    /// Scores pairs by the cosine of the angle between their embeddings.
    async fn compare(self: &Arc<Self>, scoring: Scoring) -> Result<Scores, ApiError> {
        refuse_instruction(&scoring)?;
        let work = scoring.work();
        let Scoring {
            pairs,
            most_tokens,
            template,
            ..
        } = scoring;
        // Consecutive pairs usually share their query, which is then embedded once.
        let mut queries: Vec<Arc<str>> = Vec::new();
        let mut of_query = Vec::with_capacity(pairs.len());
        let mut documents = Vec::with_capacity(pairs.len());
        for (query, document) in pairs {
            if queries.last() != Some(&query) {
                queries.push(query);
            }
            of_query.push(queries.len() - 1);
            documents.push(document);
        }
        let count = queries.len();
        let app = Arc::clone(self);
        let tokenize = move |job: &Job| {
            let tokenizer = app.text_tokenizer()?;
            let pooling = &app.engine.info().pooling;
            let encode = |purposes: &[&str], text: &str| {
                let mut prompts = purposes.iter().map(|purpose| pooling.prompt(Some(purpose)));
                let prompt = prompts.find_map(|prompt| prompt);
                let prompt = prompt.or(pooling.prompt(None)).unwrap_or_default();
                let prompt = Prompt::Text(format!("{prompt}{text}"));
                let tokens = app.encode(job, prompt, WITH_SPECIAL)?;
                app.check_count(tokens.len())?;
                Ok(tokens)
            };
            let queries = queries.iter().map(|query| encode(&["query"], query));
            let documents = documents.into_iter().map(|document| {
                let document = shortened(tokenizer, document, most_tokens)?;
                encode(&["document", "passage", "corpus"], &document)
            });
            let all = queries.chain(documents);
            all.collect::<Result<Vec<Arc<[u32]>>, ApiError>>()
        };
        let tokens = self.workers.run(work, tokenize).await?;
        let mut vectors = self.embed_all(tokens, &template).await?;
        let prompt_tokens = vectors.iter().map(|vector| vector.prompt_tokens).sum();
        for vector in &mut vectors {
            normalize(&mut vector.values);
        }
        let (queries, documents) = vectors.split_at(count);
        let pairs = documents.iter().zip(of_query);
        let scores = pairs.map(|(document, query)| {
            let products = queries[query].values.iter().zip(&document.values);
            finite(products.map(|(a, b)| a * b).sum())
        });
        Ok(Scores {
            scores: scores.collect::<Result<_, _>>()?,
            prompt_tokens,
        })
    }

    /// Scores pairs by how likely the model answers "yes" rather than "no". Prompts that begin alike
    /// share their beginning in the prefix cache.
    async fn judge(
        self: &Arc<Self>,
        caller: &Caller,
        scoring: Scoring,
    ) -> Result<Scores, ApiError> {
        let tokenizer = self.text_tokenizer()?;
        let answers = [answer(tokenizer, "yes")?, answer(tokenizer, "no")?];
        let instruction = scoring.instruction.as_deref().unwrap_or(INSTRUCTION);
        let options = RenderOptions {
            extra: Map::from_iter([("enable_thinking".to_owned(), Value::Bool(false))]),
            ..RenderOptions::default()
        };
        let (work, most_tokens) = (scoring.work(), scoring.most_tokens);
        let (app, given, pairs) = (Arc::clone(self), scoring.instruction.clone(), scoring.pairs);
        let shorten = move |job: &Job| {
            let tokenizer = app.text_tokenizer()?;
            let instruction = given.as_deref().unwrap_or(INSTRUCTION);
            let each = pairs.into_iter().map(|(query, document)| {
                job.check()?;
                let document = shortened(tokenizer, document, most_tokens)?;
                app.check_texts([instruction, &*query, &document], Length::Context)?;
                Ok((query, document))
            });
            each.collect::<Result<Vec<_>, ApiError>>()
        };
        let pairs = self.workers.run(work, shorten).await?;
        let prompt = |(query, document): (Arc<str>, String)| {
            let question =
                format!("<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}");
            Prompt::Conversation {
                messages: vec![
                    Message::new("system", SYSTEM),
                    Message::new("user", question),
                ],
                options: options.clone(),
            }
        };
        let EmbedRequest {
            priority,
            tenant,
            cache_salt,
            ..
        } = scoring.template;
        let request = Request {
            max_tokens: Some(1),
            ignore_eos: true,
            sampling: SamplingParams {
                logprobs: Some(LIKELIEST),
                ..SamplingParams::greedy()
            },
            limits: TokenLimits {
                allowed: Some(Arc::from(answers)),
                ..TokenLimits::default()
            },
            priority,
            tenant,
            cache_salt,
            ..Request::new(Prompt::Tokens(Arc::default()))
        };
        let mut scores = Vec::with_capacity(pairs.len());
        let mut prompt_tokens = 0;
        let begun = Instant::now();
        // The prompts repeat the query, so only some of them exist at a time.
        let mut prompts = pairs.into_iter().map(prompt);
        loop {
            let submission = Submission {
                request: Request {
                    finish_within: self.time_left(begun),
                    ..request.clone()
                },
                prompts: prompts.by_ref().take(self.at_once()).collect(),
                samples: 1,
                add_special: false,
                session: None,
            };
            if submission.prompts.is_empty() {
                break;
            }
            for stream in self.submit(caller, submission).await? {
                prompt_tokens += stream.prompt_ids().len();
                scores.push(judgement(stream, answers).await?);
            }
        }
        Ok(Scores {
            scores,
            prompt_tokens,
        })
    }

    /// Returns the number of texts of one request that are computed at a time.
    fn at_once(&self) -> usize {
        AT_ONCE.min(self.engine.max_open_requests())
    }

    /// Returns the time that is left to a request that has begun then, if its time is limited.
    fn time_left(&self, begun: Instant) -> Option<Duration> {
        let left = |limit: Duration| limit.saturating_sub(begun.elapsed());
        self.options.request_timeout.map(left)
    }

    /// Refuses a text of more tokens than the context, before others are tokenized.
    fn check_count(&self, tokens: usize) -> Result<(), ApiError> {
        let limit = self.engine.max_sequence_tokens();
        if tokens <= limit {
            return Ok(());
        }
        let problem = format!(
            "this model's maximum context length is {limit} tokens, but a text has {tokens} tokens"
        );
        Err(ApiError::invalid(problem).code("context_length_exceeded"))
    }

    fn text_tokenizer(&self) -> Result<&Arc<Tokenizer>, ApiError> {
        let none = SubmitError::NoTokenizer {
            needed_for: "a text",
        };
        Ok(self.engine.tokenizer().ok_or(none)?)
    }
}

impl Scoring {
    /// Returns how much there is to tokenize.
    fn work(&self) -> Work {
        let pairs = self.pairs.iter();
        Work::on(
            pairs
                .map(|(query, document)| query.len() + document.len())
                .sum(),
        )
    }
}

/// Returns the probability of the first of two answers, if there are no other ones.
async fn judgement(mut stream: TokenStream, answers: [u32; 2]) -> Result<f32, ApiError> {
    let mut logprobs = [None; 2];
    let mut least = 0.0;
    while let Some(chunk) = stream.next().await {
        let chunk = chunk?;
        let Some(token) = chunk.tokens.first() else {
            continue;
        };
        least = token
            .top
            .last()
            .map_or(token.logprob, |(_, logprob)| *logprob);
        let chosen = [(token.id, token.logprob)];
        for (id, logprob) in token.top.iter().copied().chain(chosen) {
            if let Some(index) = answers.iter().position(|answer| *answer == id) {
                logprobs[index] = Some(logprob);
            }
        }
    }
    let [yes, no] = logprobs.map(|logprob| logprob.unwrap_or(least));
    finite(1.0 / (1.0 + (no - yes).exp()))
}

/// Returns the token of an answer.
fn answer(tokenizer: &Tokenizer, text: &str) -> Result<u32, ApiError> {
    let tokens = tokenizer
        .encode(text, EncodeOptions::default())
        .map_err(SubmitError::from)?;
    match tokens[..] {
        [token] => Ok(token),
        _ => {
            let problem = format!(
                "the model cannot score texts: its answer {text:?} is not one token of its \
                 vocabulary"
            );
            Err(ApiError::invalid(problem).param("model"))
        }
    }
}

/// Returns the first `most_tokens` tokens of a text, as text.
fn shortened(
    tokenizer: &Tokenizer,
    text: String,
    most_tokens: Option<usize>,
) -> Result<String, ApiError> {
    let Some(most) = most_tokens else {
        return Ok(text);
    };
    let options = EncodeOptions {
        add_special: false,
        parse_special: false,
    };
    let tokens = tokenizer
        .encode(&text, options)
        .map_err(SubmitError::from)?;
    Ok(match tokens.get(..most) {
        Some(first) if first.len() < tokens.len() => tokenizer.decode(first, false),
        _ => text,
    })
}

fn refuse_instruction(scoring: &Scoring) -> Result<(), ApiError> {
    match scoring.instruction {
        None => Ok(()),
        Some(_) => {
            let problem = "instruction is not supported by this model: it takes pairs of texts";
            Err(ApiError::invalid(problem).param("instruction"))
        }
    }
}

/// Refuses a score that is not a finite number.
fn finite(score: f32) -> Result<f32, ApiError> {
    match score.is_finite() {
        true => Ok(score),
        false => {
            let problem = "the model produced hidden states that are not finite numbers";
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            Err(ApiError::new(status, "server_error", problem))
        }
    }
}
