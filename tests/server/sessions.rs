//! Sessions, aborts by id, snapshots and the page, over HTTP.

use common::server::{ENDLESS, endless_engine};
use quell::server::{Server, ServerOptions};
use quell::{Engine, Shutdown};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// How long a test may wait for something.
const PATIENCE: Duration = Duration::from_secs(60);

fn client() -> reqwest::Client {
    // reqwest needs a TLS provider even for plain HTTP. An error here means that one is already
    // installed.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::new()
}

/// A server with an engine that computes nothing and never ends an answer by itself.
struct Served {
    engine: Engine,
    url: String,
    client: reqwest::Client,
    stop: Option<oneshot::Sender<()>>,
    run: JoinHandle<()>,
}

impl Served {
    async fn start(change: impl FnOnce(&mut ServerOptions)) -> Self {
        let engine = endless_engine();
        let mut options = ServerOptions::new("null");
        change(&mut options);
        let server = Server::bind(engine.clone(), options, "127.0.0.1:0")
            .await
            .unwrap();
        let url = format!("http://{}", server.local_addr());
        let (stop, stopped) = oneshot::channel();
        let run = tokio::spawn(async move {
            let stopped = async {
                let _: Result<(), _> = stopped.await;
            };
            server.run(stopped).await;
        });
        Self {
            engine,
            url,
            client: client(),
            stop: Some(stop),
            run,
        }
    }

    async fn send(&self, method: Method, path: &str, body: Option<Value>) -> reqwest::Response {
        let request = self.client.request(method, format!("{}{path}", self.url));
        let request = match body {
            Some(body) => request.json(&body),
            None => request,
        };
        request.send().await.unwrap()
    }

    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        let response = self.send(method, path, body).await;
        let status = response.status();
        (status, response.json().await.unwrap())
    }

    async fn get(&self, path: &str) -> Value {
        let (status, value) = self.call(Method::GET, path, None).await;
        assert_eq!(status, StatusCode::OK, "{value}");
        value
    }

    async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.call(Method::POST, path, Some(body)).await
    }

    async fn open_session(&self) -> String {
        let (status, session) = self.call(Method::POST, "/v1/sessions", None).await;
        assert_eq!(status, StatusCode::CREATED);
        session["id"].as_str().unwrap().to_owned()
    }

    /// Starts a stream that outlasts the test, and reads its first event.
    async fn endless(&self, mut body: Value) -> (Events, Value) {
        body["stream"] = json!(true);
        body["max_tokens"] = json!(ENDLESS);
        // Without a tokenizer, there is no text, and only log probabilities make an event.
        body["logprobs"] = json!(0);
        let response = self.send(Method::POST, "/v1/completions", Some(body)).await;
        assert_eq!(response.status(), StatusCode::OK);
        let mut events = Events::of(response);
        let first = events.next().await.unwrap();
        (events, first)
    }

    /// Waits until nothing is held any more.
    async fn wait_until_idle(&self) {
        let until = Instant::now() + PATIENCE;
        while !self.engine.inspect().await.unwrap().is_idle() {
            assert!(Instant::now() < until, "{:?}", self.engine.inspect().await);
            tokio::task::yield_now().await;
        }
    }
}

/// The events of a response.
struct Events {
    response: reqwest::Response,
    bytes: Vec<u8>,
    ready: VecDeque<Value>,
}

impl Events {
    fn of(response: reqwest::Response) -> Self {
        Self {
            response,
            bytes: Vec::new(),
            ready: VecDeque::new(),
        }
    }

    /// Returns the next event that is JSON, or `None` at the end.
    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            let bytes = self.response.chunk().await.unwrap()?;
            self.bytes.extend_from_slice(&bytes);
            while let Some(end) = self.bytes.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = self.bytes.drain(..end + 2).collect();
                let data = event.strip_prefix(b"data: ").unwrap_or(&[]);
                self.ready
                    .extend(serde_json::from_slice::<Value>(data).ok());
            }
        }
    }

    /// Reads to the end and returns why the answer ended.
    async fn finish_reason(mut self) -> String {
        let mut reason = Value::Null;
        while let Some(event) = self.next().await {
            assert!(event["error"].is_null(), "{event}");
            reason = event["choices"][0]["finish_reason"].clone();
        }
        reason.as_str().unwrap().to_owned()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_keeps_its_context_across_turns_until_it_ends() {
    let served = Served::start(|_| ()).await;
    let (status, session) = served
        .post("/v1/sessions", json!({"pin_seconds": 60}))
        .await;
    assert_eq!(status, StatusCode::CREATED);
    assert_eq!(session["object"], "session");
    assert_eq!(session["pin_seconds"], 60.0);
    assert_eq!(session["context_tokens"], 0);
    let id = session["id"].as_str().unwrap();
    let path = format!("/v1/sessions/{id}");

    let turn = |prompt: Value| json!({"prompt": prompt, "max_tokens": 4, "session_id": id});
    let (status, answer) = served.post("/v1/completions", turn(json!([1, 2, 3]))).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let session = served.get(&path).await;
    // The last token is sampled, but not computed before the next turn.
    assert_eq!(
        (&session["context_tokens"], &session["kept_tokens"]),
        (&json!(7), &json!(6))
    );
    assert_eq!(
        (&session["kept_blocks"], &session["pinned"]),
        (&json!(1), &json!(true))
    );
    assert_eq!(session["generating"], false);

    let (_, answer) = served.post("/v1/completions", turn(json!([9]))).await;
    assert_eq!(answer["usage"]["prompt_tokens"], 8);
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 6);
    assert_eq!(served.get(&path).await["context_tokens"], 12);
    assert_eq!(served.get("/v1/sessions").await["data"][0]["id"], id);

    let (status, ended) = served.call(Method::DELETE, &path, None).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(ended["blocks_freed"], 1);
    assert!(ended["posted_to_freed_ms"].as_f64().unwrap() >= 0.0);
    served.wait_until_idle().await;
    for (method, path) in [(Method::GET, &path), (Method::DELETE, &path)] {
        let (status, error) = served.call(method, path, None).await;
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert_eq!(error["error"]["code"], "session_not_found");
    }
    let (status, _) = served.post("/v1/completions", turn(json!([1]))).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_has_one_turn_at_a_time_until_it_is_stopped() {
    let served = Served::start(|_| ()).await;
    let id = served.open_session().await;
    let path = format!("/v1/sessions/{id}");
    let turn = json!({"prompt": [5, 6], "session_id": id});
    for (mode, kept) in [("rewind", false), ("keep", true)] {
        let (events, _) = served.endless(turn.clone()).await;
        assert_eq!(served.get(&path).await["generating"], true);
        let (status, error) = served.post("/v1/completions", turn.clone()).await;
        assert_eq!(status, StatusCode::CONFLICT);
        assert_eq!(error["error"]["code"], "session_busy");
        let stop = served
            .post(&format!("{path}/stop"), json!({"mode": mode}))
            .await;
        let (status, receipt) = stop;
        assert_eq!(status, StatusCode::OK, "{receipt}");
        let generated = receipt["tokens_generated"].as_u64().unwrap();
        assert!(generated > 0);
        assert_eq!(events.finish_reason().await, "abort");
        let session = served.get(&path).await;
        assert_eq!(session["generating"], false);
        let expected = if kept { 2 + generated } else { 0 };
        assert_eq!(session["context_tokens"], expected, "{mode}");
    }
    // There is no turn to stop any more.
    let (status, receipt) = served
        .call(Method::POST, &format!("{path}/stop"), None)
        .await;
    assert_eq!(
        (status, &receipt["blocks_freed"]),
        (StatusCode::OK, &json!(0))
    );
    let (status, error) = served
        .post(&format!("{path}/stop"), json!({"mode": "both"}))
        .await;
    assert_eq!(
        (status, &error["error"]["param"]),
        (StatusCode::BAD_REQUEST, &json!("mode"))
    );
    served.call(Method::DELETE, &path, None).await;
    served.wait_until_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ending_a_session_ends_its_turn() {
    let served = Served::start(|_| ()).await;
    let id = served.open_session().await;
    let (events, _) = served
        .endless(json!({"prompt": [5], "session_id": id}))
        .await;
    let path = format!("/v1/sessions/{id}");
    let (_, receipt) = served.call(Method::DELETE, &path, None).await;
    assert!(receipt["blocks_freed"].as_u64().unwrap() > 0, "{receipt}");
    assert_eq!(events.finish_reason().await, "abort");
    served.wait_until_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disconnect_during_a_turn_leaves_the_session_unchanged() {
    let served = Served::start(|_| ()).await;
    let id = served.open_session().await;
    let (events, _) = served
        .endless(json!({"prompt": [5], "session_id": id}))
        .await;
    drop(events);
    let path = format!("/v1/sessions/{id}");
    let until = Instant::now() + PATIENCE;
    while served.get(&path).await["generating"] == true {
        assert!(Instant::now() < until);
    }
    assert_eq!(served.get(&path).await["context_tokens"], 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_number_of_sessions_is_limited() {
    let served = Served::start(|options| options.max_sessions = 2).await;
    let first = served.open_session().await;
    served.open_session().await;
    let response = served.send(Method::POST, "/v1/sessions", None).await;
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(response.headers().contains_key("retry-after"));
    let path = format!("/v1/sessions/{first}");
    served.call(Method::DELETE, &path, None).await;
    served.open_session().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_sessions_expire_and_busy_ones_do_not() {
    // Long enough for each turn to begin in time.
    let ttl = Duration::from_secs(5);
    let served = Served::start(|options| options.session_ttl = ttl).await;
    let busy = served.open_session().await;
    let (_events, _) = served
        .endless(json!({"prompt": [5], "session_id": busy}))
        .await;
    let left = served.open_session().await;
    let turn = json!({"prompt": [7], "session_id": left});
    let (status, _) = served.post("/v1/completions", turn).await;
    assert_eq!(status, StatusCode::OK);
    let until = Instant::now() + PATIENCE;
    let ids = loop {
        let list = served.get("/v1/sessions").await;
        let ids: Vec<String> = list["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|session| session["id"].as_str().unwrap().to_owned())
            .collect();
        if !ids.contains(&left) {
            break ids;
        }
        assert!(Instant::now() < until);
    };
    assert_eq!(ids, [busy]);
    // The server forgets the session before the engine does.
    while served.engine.inspect().await.unwrap().retained_sessions > 0 {
        assert!(Instant::now() < until, "its blocks are still kept");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalid_session_requests_are_refused_with_their_field() {
    let served = Served::start(|_| ()).await;
    let id = served.open_session().await;
    for (body, param) in [
        (
            json!({"prompt": [[1], [2]], "session_id": id}),
            "session_id",
        ),
        (
            json!({"prompt": [1], "n": 2, "session_id": id}),
            "session_id",
        ),
        (json!({"prompt": [1], "session_id": 7}), "session_id"),
        (json!({"prompt": [], "session_id": id}), "prompt"),
    ] {
        let (status, error) = served.post("/v1/completions", body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{error}");
        assert_eq!(error["error"]["param"], param, "{error}");
    }
    for pin in [json!(-1), json!("long"), json!(1e300)] {
        let (status, error) = served
            .post("/v1/sessions", json!({"pin_seconds": pin}))
            .await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{error}");
        assert_eq!(error["error"]["param"], "pin_seconds");
    }
}

/// The answer to the abort reports how many blocks were freed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_can_be_aborted_by_its_answers_id_or_its_number() {
    let served = Served::start(|_| ()).await;
    for field in ["request_id", "rid"] {
        let (events, first) = served.endless(json!({"prompt": [5]})).await;
        let answer = &first["id"];
        let number = served.engine.snapshot().await.unwrap().requests[0]
            .id
            .as_u64();
        let id = if field == "rid" {
            json!(number.to_string())
        } else {
            answer.clone()
        };
        let (status, done) = served.post("/abort_request", json!({field: id})).await;
        assert_eq!(status, StatusCode::OK, "{done}");
        assert_eq!(done["aborted"][0]["id"], number);
        assert!(done["aborted"][0]["blocks_freed"].as_u64().unwrap() > 0);
        assert_eq!(events.finish_reason().await, "abort");
        // Aborting again finds nothing open, and is no error.
        for again in [answer.clone(), json!(number)] {
            let (status, done) = served.post("/abort_request", json!({field: again})).await;
            assert_eq!((status, done), (StatusCode::OK, json!({"aborted": []})));
        }
        served.wait_until_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn aborting_a_request_aborts_all_its_answers_and_no_others() {
    let served = Served::start(|_| ()).await;
    let (two, first) = served.endless(json!({"prompt": [5], "n": 2})).await;
    let (other, _) = served.endless(json!({"prompt": [6]})).await;
    let abort = served
        .post("/abort_request", json!({"request_id": first["id"]}))
        .await;
    assert_eq!(abort.1["aborted"].as_array().unwrap().len(), 2);
    assert_eq!(two.finish_reason().await, "abort");
    assert_eq!(served.engine.inspect().await.unwrap().open, 1);
    let abort = served
        .post("/abort_request", json!({"abort_all": true}))
        .await;
    assert_eq!(abort.1["aborted"].as_array().unwrap().len(), 1);
    assert_eq!(other.finish_reason().await, "abort");
    served.wait_until_idle().await;
    let (status, error) = served.post("/abort_request", json!({})).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(error["error"]["param"], "request_id");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_lists_open_requests_and_the_owner_of_each_block() {
    let served = Served::start(|_| ()).await;
    let (events, first) = served.endless(json!({"prompt": [5], "user": "team"})).await;
    let snapshot = served.get("/v1/engine/snapshot").await;
    assert_eq!(snapshot["model"], "null");
    let request = &snapshot["requests"][0];
    assert_eq!(
        (&request["label"], &request["tenant"]),
        (&first["id"], &json!("team"))
    );
    let runs: Vec<i64> = serde_json::from_value(snapshot["blocks"].clone()).unwrap();
    assert_eq!(runs.chunks(2).map(|run| run[1]).sum::<i64>(), 4096);
    assert_eq!(runs[0], 4, "the first block is the first request's");
    drop(events);
    served.wait_until_idle().await;
    for query in ["every_ms=1", "every_ms=soon", "stream=perhaps"] {
        let path = format!("/v1/engine/snapshot?{query}");
        let (status, error) = served.call(Method::GET, &path, None).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_stream_ends_when_the_server_has_drained() {
    let mut served = Served::start(|_| ()).await;
    let path = "/v1/engine/snapshot?stream=true&every_ms=50";
    let mut watch = Events::of(served.send(Method::GET, path, None).await);
    let before = watch.next().await.unwrap()["stats"]["steps"]
        .as_u64()
        .unwrap();
    let turn = json!({"prompt": [7], "max_tokens": 3});
    let (status, _) = served.post("/v1/completions", turn).await;
    assert_eq!(status, StatusCode::OK);
    let until = Instant::now() + PATIENCE;
    loop {
        let snapshot = watch.next().await.unwrap();
        if snapshot["recent_ends"][0]["outcome"] == "length" {
            assert!(snapshot["stats"]["steps"].as_u64().unwrap() > before);
            break;
        }
        assert!(Instant::now() < until);
    }
    drop(served.stop.take());
    while watch.next().await.is_some() {}
    served.run.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_loads_nothing_from_other_sites() {
    let served = Served::start(|_| ()).await;
    let mut policies = Vec::new();
    for _ in 0..2 {
        let response = served.send(Method::GET, "/", None).await;
        let header = |name| response.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(header("content-type"), "text/html; charset=utf-8");
        let policy = header("content-security-policy");
        assert!(
            policy.contains("default-src 'none'") && !policy.contains("unsafe"),
            "{policy}"
        );
        let page = response.text().await.unwrap();
        assert!(page.len() < 50 << 10, "{} bytes", page.len());
        let nonce = policy
            .split("'nonce-")
            .nth(1)
            .unwrap()
            .split('\'')
            .next()
            .unwrap();
        assert_eq!(page.matches(&format!("nonce=\"{nonce}\"")).count(), 2);
        let elsewhere = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!elsewhere.contains("http://") && !elsewhere.contains("https://"));
        policies.push(policy);
    }
    assert_ne!(policies[0], policies[1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_cannot_be_reported_is_not_left_open() {
    let served = Served::start(|options| options.max_sessions = 1).await;
    served.engine.shutdown(Shutdown::Abort).await.unwrap();
    for _ in 0..2 {
        // The second time, a session that was left open would be one too many.
        let (status, error) = served.post("/v1/sessions", json!({})).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{error}");
        assert_eq!(error["error"]["code"], "engine_closed");
    }
}
