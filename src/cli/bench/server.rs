//! `quell bench --server`: puts load on any server with OpenAI's API.

use super::args::BenchArgs;
use super::exchange::{End, Failure, Sample, Target, root_cause};
use super::load::{Load, Work, start};
use super::prompts::{Endpoint, Prompts};
use super::report::Summary;
use crate::cli::args::Format;
use crate::cli::error::CliError;
use crate::cli::generate::println_json;
use crate::cli::progress;
use crate::cli::tls;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Client, Url, redirect};
use serde_json::{Value, json};
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// Upper bound of the token ids in prompts, unless the server's vocabulary is smaller. In
/// most vocabularies, special tokens come after it.
const DEFAULT_VOCABULARY: u64 = 30_000;

/// How long a server may take to tell which models it serves.
const ASKING: Duration = Duration::from_secs(30);

/// Maximum length of a prompt or an answer. A larger number is assumed to be a mistake.
const MOST_TOKENS: usize = 10_000_000;

/// Measurement number of the warm-up requests. No real measurement has it.
const WARM_UP: u64 = u64::MAX;

/// Why the measurement failed or is not valid.
#[derive(Debug, Error)]
enum ServerBenchError {
    #[error("{url} cannot be reached: {problem}")]
    Unreachable { url: Url, problem: String },
    #[error("{url} does not list its models ({problem}); name one with --model")]
    NoModel { url: Url, problem: String },
    #[error("cannot create the HTTP client: {0}")]
    Client(String),
    #[error("the warm-up failed: {0}")]
    WarmUp(Failure),
    #[error("{failed} of {total} requests failed: {kinds}")]
    Failed {
        failed: usize,
        total: usize,
        kinds: String,
    },
}

impl From<ServerBenchError> for CliError {
    fn from(error: ServerBenchError) -> Self {
        Self::Measurement(error.into())
    }
}

/// The checked arguments.
struct Plan<'a> {
    args: &'a BenchArgs,
    /// Base URL of the server, without `/v1`.
    url: Url,
    headers: HeaderMap,
    timeout: Duration,
    loads: Vec<Load>,
}

/// What a server reports about itself.
struct Served {
    model: String,
    vocabulary: Option<u64>,
    version: Option<String>,
}

/// Measures the server at `url`.
pub fn run(url: &str, args: &BenchArgs) -> Result<(), CliError> {
    let plan = Plan::new(url, args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(measure(&plan));
    // Requests may still be open after Ctrl-C.
    runtime.shutdown_background();
    result
}

fn usage(problem: String) -> CliError {
    CliError::Usage(problem)
}

impl<'a> Plan<'a> {
    fn new(url: &str, args: &'a BenchArgs) -> Result<Self, CliError> {
        let server = &args.server;
        let count = |flag: &str, value: usize| {
            if (1..=MOST_TOKENS).contains(&value) {
                return Ok(());
            }
            let problem = format!("{flag} is {value}, but must be from 1 to {MOST_TOKENS}");
            Err(usage(problem))
        };
        count("--prompt", args.prompt)?;
        count("--generate", args.generate)?;
        if server.requests == 0 {
            return Err(usage("--requests is 0, but must be at least 1".to_owned()));
        }
        if server.shared_prefix > args.prompt {
            return Err(usage(format!(
                "--shared-prefix is {}, but --prompt is {}",
                server.shared_prefix, args.prompt
            )));
        }
        let share = server.cancel_share;
        if !(0.0..=1.0).contains(&share) {
            let problem = format!("--cancel-share is {share}, but must be from 0 to 1");
            return Err(usage(problem));
        }
        if server.vocabulary == Some(0) {
            let problem = "--vocabulary is 0, but must be at least 1".to_owned();
            return Err(usage(problem));
        }
        for &rate in &server.rate {
            if !(0.0001..=1e6).contains(&rate) {
                let problem = format!("--rate is {rate}, but must be from 0.0001 to 1000000");
                return Err(usage(problem));
            }
        }
        if !(server.timeout > 0.0 && server.timeout <= 1e6) {
            let problem = format!(
                "--timeout is {}, but must be more than 0 and at most 1000000 seconds",
                server.timeout
            );
            return Err(usage(problem));
        }
        let rates = server.rate.iter().map(|&rate| Load::Rate(rate));
        let clients = args.concurrency.iter();
        let loads = if server.rate.is_empty() {
            clients.map(|&count| Load::Concurrency(count)).collect()
        } else {
            rates.collect()
        };
        Ok(Self {
            args,
            url: base_url(url)?,
            headers: headers(server.api_key_env.as_deref())?,
            timeout: Duration::from_secs_f64(server.timeout),
            loads,
        })
    }

    fn url(&self, path: &str) -> Url {
        let mut url = self.url.clone();
        let base = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{base}{path}"));
        url
    }

    fn client(&self) -> Result<Client, ServerBenchError> {
        tls::provide();
        let mut builder = Client::builder()
            .default_headers(self.headers.clone())
            .user_agent(concat!("quell-bench/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::none());
        if self.url.scheme() == "http" {
            // The system's certificates are not needed and may not be there.
            builder = builder.tls_certs_only([]);
        }
        builder
            .build()
            .map_err(|error| ServerBenchError::Client(root_cause(&error)))
    }
}

/// Returns the server's URL without a trailing `/v1`, which OpenAI's clients expect in it.
fn base_url(text: &str) -> Result<Url, CliError> {
    let wrong = |problem: &str| usage(format!("--server is {text:?}, {problem}"));
    let url = Url::parse(text).map_err(|error| wrong(&format!("not a valid URL: {error}")))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(wrong("but must begin with http:// or https://"));
    }
    let mut base = url.clone();
    let path = url.path().trim_end_matches('/');
    base.set_path(path.strip_suffix("/v1").unwrap_or(path));
    base.set_query(None);
    base.set_fragment(None);
    Ok(base)
}

fn headers(variable: Option<&str>) -> Result<HeaderMap, CliError> {
    let mut headers = HeaderMap::new();
    if let Some(variable) = variable {
        let wrong = |problem: &str| usage(format!("--api-key-env is {variable}, {problem}"));
        let key = std::env::var(variable).map_err(|error| wrong(&format!("but {error}")))?;
        let value = HeaderValue::try_from(format!("Bearer {}", key.trim()));
        let mut value = value.map_err(|_| wrong("whose value is not a valid API key"))?;
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
    Ok(headers)
}

async fn measure(plan: &Plan<'_>) -> Result<(), CliError> {
    let mut interrupt = Interrupt::listen()?;
    let client = plan.client()?;
    let (args, server) = (plan.args, &plan.args.server);
    let begin = SystemTime::now().duration_since(UNIX_EPOCH);
    let served = tokio::select! {
        served = served(plan, &client) => served?,
        () = interrupt.pressed() => return Err(CliError::Interrupted),
    };
    let limit = served.vocabulary.unwrap_or(DEFAULT_VOCABULARY);
    let prompts = Prompts {
        endpoint: server.endpoint,
        model: served.model.clone(),
        length: args.prompt,
        shared: server.shared_prefix,
        generate: args.generate,
        vocabulary: server.vocabulary.unwrap_or(limit.min(DEFAULT_VOCABULARY)),
        seed: server.seed,
    };
    let work = |point, requests, cancel_share| {
        let target = Target {
            client: client.clone(),
            url: plan.url(server.endpoint.path()),
            timeout: plan.timeout,
        };
        Work::new(target, prompts.clone(), point, requests, cancel_share)
    };
    if server.warm_up > 0 {
        let work = work(WARM_UP, server.warm_up, 0.0);
        let warmed = point(Load::Concurrency(1), work, "warming up", &mut interrupt).await?;
        if warmed.interrupted {
            return Err(CliError::Interrupted);
        }
        for sample in warmed.samples {
            if let End::Failed(failure) = sample.end {
                return Err(ServerBenchError::WarmUp(failure).into());
            }
        }
    }
    let mut summaries = Vec::new();
    let mut interrupted = false;
    for (number, &load) in plan.loads.iter().enumerate() {
        let work = work(number as u64, server.requests, server.cancel_share);
        let measured = point(load, work, "requests", &mut interrupt).await?;
        interrupted = measured.interrupted;
        summaries.push(Summary::of(load, &measured.samples, measured.sent));
        if interrupted {
            break;
        }
    }
    let begin = begin.map_or(0, |begin| begin.as_secs());
    let report = Report {
        plan,
        served: &served,
        prompts: &prompts,
        summaries: &summaries,
        begin,
        interrupted,
    };
    match args.format {
        Format::Json => println_json(&report.json())?,
        Format::Text => report.print()?,
    }
    verdict(&summaries, interrupted)
}

/// The results of one measurement.
struct Measured {
    samples: Vec<Sample>,
    sent: u64,
    interrupted: bool,
}

/// Sends the requests of one measurement, and waits for the last answer or for Ctrl-C.
async fn point(
    load: Load,
    work: Work,
    message: &'static str,
    interrupt: &mut Interrupt,
) -> Result<Measured, CliError> {
    let bar = progress::bar(work.requests, message);
    let work = Arc::new(work);
    let mut running = start(load, &work)?;
    let mut samples = Vec::new();
    let interrupted = loop {
        tokio::select! {
            sample = running.samples.recv() => match sample {
                Some(sample) => samples.push(sample),
                None => break false,
            },
            () = interrupt.pressed() => break true,
        }
        bar.inc(1);
    };
    // Requests that ended before the interrupt are measured too.
    while let Ok(sample) = running.samples.try_recv() {
        samples.push(sample);
    }
    bar.finish_and_clear();
    Ok(Measured {
        samples,
        sent: work.sent(),
        interrupted,
    })
}

/// Returns an error if a request failed or if the measurement was interrupted.
fn verdict(summaries: &[Summary], interrupted: bool) -> Result<(), CliError> {
    let failed = summaries.iter().map(Summary::failed).sum();
    if failed > 0 {
        let kinds = summaries.iter().flat_map(Summary::failures);
        let kinds: Vec<String> = kinds
            .map(|(kind, count, message)| format!("{count} × {kind} ({message})"))
            .collect();
        return Err(ServerBenchError::Failed {
            failed,
            total: summaries.iter().map(Summary::ended).sum(),
            kinds: kinds.join(", "),
        }
        .into());
    }
    if interrupted {
        return Err(CliError::Interrupted);
    }
    Ok(())
}

/// Asks the server which models it serves. An unreachable server is an error. A server that
/// does not list its models is an error only if the command line names no model.
async fn served(plan: &Plan<'_>, client: &Client) -> Result<Served, ServerBenchError> {
    let url = plan.url("/v1/models");
    let timeout = ASKING.min(plan.timeout);
    let answer = client.get(url.clone()).timeout(timeout).send().await;
    let answer = answer.map_err(|error| ServerBenchError::Unreachable {
        url: plan.url.clone(),
        problem: root_cause(&error),
    })?;
    let status = answer.status();
    let list: Value = answer.json().await.unwrap_or_default();
    let named = plan.args.model.model.as_deref();
    let models = list["data"].as_array().map_or(&[][..], Vec::as_slice);
    let asked_for = |model: &&Value| named.is_none_or(|name| model["id"] == name);
    let entry = models.iter().find(asked_for);
    let listed = entry.and_then(|model| model["id"].as_str());
    let Some(model) = named.or(listed) else {
        let problem = if status.is_success() {
            "no model in the answer".to_owned()
        } else {
            format!("HTTP {}", status.as_u16())
        };
        return Err(ServerBenchError::NoModel { url, problem });
    };
    // llama.cpp's server calls it `n_vocab`.
    let sizes = entry.map(|model| [&model["vocab_size"], &model["meta"]["n_vocab"]]);
    let vocabulary = sizes.and_then(|sizes| sizes.iter().find_map(|size| size.as_u64()));
    let version = async {
        let request = client.get(plan.url("/version")).timeout(timeout);
        let version: Value = request.send().await.ok()?.json().await.ok()?;
        Some(version["version"].as_str()?.to_owned())
    };
    Ok(Served {
        model: model.to_owned(),
        vocabulary: vocabulary.filter(|&size| size > 0),
        version: version.await,
    })
}

/// All measurements and the settings that they were made with.
struct Report<'a> {
    plan: &'a Plan<'a>,
    served: &'a Served,
    prompts: &'a Prompts,
    summaries: &'a [Summary],
    /// Start of the measurements, in seconds since 1970.
    begin: u64,
    interrupted: bool,
}

impl Report<'_> {
    fn json(&self) -> Value {
        let (server, prompts) = (&self.plan.args.server, self.prompts);
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "server": self.plan.url.as_str(),
            "server_version": self.served.version,
            "model": self.served.model,
            "endpoint": server.endpoint.name(),
            "started_unix_s": self.begin,
            "interrupted": self.interrupted,
            "configuration": {
                "requests": server.requests,
                "rate": server.rate,
                "concurrency": if server.rate.is_empty() {
                    json!(self.plan.args.concurrency)
                } else {
                    json!([])
                },
                "prompt": prompts.length,
                "generate": prompts.generate,
                "shared_prefix": prompts.shared,
                "vocabulary": prompts.vocabulary,
                "cancel_share": server.cancel_share,
                "warm_up": server.warm_up,
                "seed": server.seed,
                "timeout_s": server.timeout,
            },
            "points": self.summaries.iter().map(Summary::json).collect::<Vec<_>>(),
        })
    }

    fn print(&self) -> Result<(), CliError> {
        let prompts = self.prompts;
        let unit = match prompts.endpoint {
            Endpoint::Completions => "tokens",
            Endpoint::Chat => "words",
        };
        let mut out = std::io::stdout().lock();
        writeln!(
            out,
            "{} at {}: prompts of {} {unit}, answers of {} tokens",
            self.served.model, self.plan.url, prompts.length, prompts.generate
        )?;
        for summary in self.summaries {
            summary.print(&mut out)?;
        }
        Ok(out.flush()?)
    }
}

/// Listener for Ctrl-C.
struct Interrupt {
    #[cfg(unix)]
    signal: tokio::signal::unix::Signal,
    #[cfg(windows)]
    signal: tokio::signal::windows::CtrlC,
}

impl Interrupt {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            #[cfg(unix)]
            signal: tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?,
            #[cfg(windows)]
            signal: tokio::signal::windows::ctrl_c()?,
        })
    }

    async fn pressed(&mut self) {
        if self.signal.recv().await.is_none() {
            // No further signal can arrive.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_servers_url_may_end_with_v1_or_have_a_path() {
        let base = |text| base_url(text).unwrap().to_string();
        assert_eq!(base("http://host:8000"), "http://host:8000/");
        assert_eq!(base("http://host:8000/v1/"), "http://host:8000/");
        assert_eq!(base("https://host/llm/v1?x#y"), "https://host/llm");
        for wrong in ["host:8000", "ftp://host", "", "http://"] {
            let problem = base_url(wrong).unwrap_err();
            assert_eq!(problem.exit_code(), 2);
            assert!(problem.to_string().contains("--server"), "{problem}");
        }
    }
}
