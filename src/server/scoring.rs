//! Scores how well documents answer a query, in the way that the model was made for.

use super::App;
use super::error::ApiError;
use super::http::auth::Caller;
use super::http::workers::{Job, Work};
use super::submit::{Length, Submission, Tokenization};
use crate::engine::{EmbedRequest, Prompt, Request, SubmitError, TokenStream, normalize};
use crate::sampling::{SamplingParams, TokenLimits};
use crate::text::{EncodeOptions, Message, RenderOptions, Tokenizer};
use futures_util::StreamExt;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Instant;

/// Number of likeliest tokens among which the two answers of a generating model are looked up. An
/// answer that is not among them counts as likely as the last of them.
const LIKELIEST: u32 = 64;

/// What a tokenizer is needed for, in errors.
const NEEDED_FOR: &str = "a text";

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
    /// The user, the priority and the salt of the request, as the client asks for them.
    pub template: EmbedRequest,
}

/// The scores of all pairs, in order, and what they took.
pub(super) struct Scores {
    pub scores: Vec<f32>,
    pub prompt_tokens: usize,
}

impl App {
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
            self.classify(caller, scoring).await
        } else if embeds {
            self.compare(caller, scoring).await
        } else {
            self.judge(caller, scoring).await
        }
    }

    /// Scores pairs with a classifier.
    async fn classify(
        self: &Arc<Self>,
        caller: &Caller,
        scoring: Scoring,
    ) -> Result<Scores, ApiError> {
        refuse_instruction(&scoring)?;
        let template = scoring.template.clone();
        let encode = |app: &Self, _: &Job, query: Arc<str>, document: String| {
            app.check_texts([&*query, &document], Length::Context)?;
            let tokens = app.engine.pair_tokens(&query, &document)?;
            // A query is part of every pair, so pairs that are too long would add up.
            app.engine.require_fits(tokens.len())?;
            Ok(tokens.into())
        };
        let tokens = self.of_pairs(scoring, encode).await?;
        let embeddings = self.embed_all(caller, tokens, template).await?;
        let prompt_tokens = embeddings.iter().map(|one| one.prompt_tokens).sum();
        // A classifier with several labels is refused when it is loaded.
        let scores = embeddings.iter().flat_map(|one| one.values.first());
        Ok(Scores {
            scores: scores
                .map(|score| finite(*score))
                .collect::<Result<_, _>>()?,
            prompt_tokens,
        })
    }

    /// Scores pairs by the cosine of the angle between their embeddings. A query that consecutive
    /// pairs share is embedded once.
    async fn compare(
        self: &Arc<Self>,
        caller: &Caller,
        scoring: Scoring,
    ) -> Result<Scores, ApiError> {
        refuse_instruction(&scoring)?;
        let template = scoring.template.clone();
        let mut last = None;
        let encode = move |app: &Self, job: &Job, query: Arc<str>, document: String| {
            let query_tokens = match last.as_ref() == Some(&query) {
                true => None,
                false => Some(app.encode_for(job, &["query"], &query)?),
            };
            last = Some(query);
            let purposes = ["document", "passage", "corpus"];
            Ok((query_tokens, app.encode_for(job, &purposes, &document)?))
        };
        let mut inputs = Vec::new();
        // Indices in `inputs` of the query and the document of each pair.
        let mut pairs = Vec::new();
        let mut query = 0;
        for (new_query, document) in self.of_pairs(scoring, encode).await? {
            if let Some(tokens) = new_query {
                query = inputs.len();
                inputs.push(tokens);
            }
            pairs.push((query, inputs.len()));
            inputs.push(document);
        }
        let mut vectors = self.embed_all(caller, inputs, template).await?;
        for vector in &mut vectors {
            normalize(&mut vector.values);
        }
        let scores = pairs.into_iter().map(|(query, document)| {
            let [a, b] = [query, document].map(|index| &vectors[index].values);
            finite(a.iter().zip(b).map(|(a, b)| a * b).sum())
        });
        Ok(Scores {
            scores: scores.collect::<Result<_, _>>()?,
            prompt_tokens: vectors.iter().map(|one| one.prompt_tokens).sum(),
        })
    }

    /// Tokenizes a text to be embedded, after the model's own text for the first of these purposes
    /// that it has one for.
    fn encode_for(&self, job: &Job, purposes: &[&str], text: &str) -> Result<Arc<[u32]>, ApiError> {
        let pooling = &self.engine.info().pooling;
        let mut prompts = purposes.iter().map(|purpose| pooling.prompt(Some(purpose)));
        let prompt = prompts.find_map(|prompt| prompt);
        let prompt = prompt.or(pooling.prompt(None)).unwrap_or_default();
        let tokens = self.encode(job, Prompt::Text(format!("{prompt}{text}")), WITH_SPECIAL)?;
        self.engine.require_fits(tokens.len())?;
        Ok(tokens)
    }

    /// Scores pairs by how likely the model answers "yes" rather than "no". Prompts that begin alike
    /// share their beginning in the prefix cache.
    async fn judge(
        self: &Arc<Self>,
        caller: &Caller,
        scoring: Scoring,
    ) -> Result<Scores, ApiError> {
        let tokenizer = self.require_tokenizer(NEEDED_FOR)?;
        let answers = [answer(tokenizer, "yes")?, answer(tokenizer, "no")?];
        let instruction: Arc<str> = scoring.instruction.as_deref().unwrap_or(INSTRUCTION).into();
        let options = RenderOptions {
            extra: Map::from_iter([("enable_thinking".to_owned(), Value::Bool(false))]),
            ..RenderOptions::default()
        };
        let template = scoring.template.clone();
        let asked = Arc::clone(&instruction);
        let check = move |app: &Self, _: &Job, query: Arc<str>, document: String| {
            app.check_texts([&*asked, &query, &document], Length::Context)?;
            Ok((query, document))
        };
        let pairs = self.of_pairs(scoring, check).await?;
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
        } = template;
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

    /// Shortens the document of each pair, and returns what `each` makes of the pairs, on a thread for
    /// long work.
    async fn of_pairs<T: Send + 'static>(
        self: &Arc<Self>,
        scoring: Scoring,
        mut each: impl FnMut(&Self, &Job, Arc<str>, String) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<Vec<T>, ApiError> {
        let Scoring {
            pairs, most_tokens, ..
        } = scoring;
        let bytes = pairs
            .iter()
            .map(|(query, document)| query.len() + document.len());
        let work = Work::on(bytes.sum());
        let app = Arc::clone(self);
        let run = move |job: &Job| {
            let tokenizer = app.require_tokenizer(NEEDED_FOR)?;
            let pairs = pairs.into_iter().map(|(query, document)| {
                job.check()?;
                let document = shortened(tokenizer, document, most_tokens)?;
                each(&app, job, query, document)
            });
            pairs.collect()
        };
        self.workers.run(work, run).await
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
        false => Err(ApiError::not_finite()),
    }
}
