//! `--model hf:…`: runs the program against a small hub inside the test.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// An address that nothing listens on.
const NOWHERE: &str = "http://127.0.0.1:1";

/// The files of a repository, and how the hub treats requests for them.
#[derive(Default)]
struct Repository {
    files: HashMap<String, Vec<u8>>,
    /// Files whose first transfer breaks off half-way.
    interrupted: HashSet<String>,
    /// Token that requests must present.
    token: Option<&'static str>,
    /// The requests so far, in order, each as `GET PATH RANGE`.
    log: Vec<String>,
}

/// A hub with the repository `org/tiny`, on its own port.
struct FakeHub {
    endpoint: String,
    repository: Arc<Mutex<Repository>>,
    home: tempfile::TempDir,
}

impl FakeHub {
    fn new(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let files = files.into_iter().collect();
        let repository = Arc::new(Mutex::new(Repository {
            files,
            ..Repository::default()
        }));
        let shared = Arc::clone(&repository);
        // The thread ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &shared);
            }
        });
        Self {
            endpoint,
            repository,
            home: tempfile::tempdir().unwrap(),
        }
    }

    fn quell(&self, arguments: &[&str]) -> Output {
        quell(&self.endpoint, self.home.path(), arguments)
    }

    /// Returns the requests since the last call.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.repository.lock().unwrap().log)
    }

    fn snapshot(&self) -> PathBuf {
        self.home
            .path()
            .join("hub/models--org--tiny/snapshots")
            .join(COMMIT)
    }
}

fn quell(endpoint: &str, home: &Path, arguments: &[&str]) -> Output {
    command(endpoint, home, arguments).output().unwrap()
}

fn command(endpoint: &str, home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(common::program::path());
    for proxy in [
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ] {
        command.env_remove(proxy);
    }
    command
        .env("HF_ENDPOINT", endpoint)
        .env("HF_HOME", home)
        .env_remove("HF_TOKEN");
    command.args(arguments);
    command
}

/// Answers one request like the hub, as far as a download needs.
fn answer(mut stream: TcpStream, repository: &Mutex<Repository>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap())
        .lines()
        .map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = HashMap::new();
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap();
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let mut repository = repository.lock().unwrap();
    let range = headers.get("range").map_or("", String::as_str);
    repository.log.push(format!("GET {path} {range}"));
    let token = repository.token.map(|token| format!("Bearer {token}"));
    if token.is_some() && token.as_ref() != headers.get("authorization") {
        return reply(&mut stream, "401 Unauthorized", "", b"");
    }
    let revisions = ["main", "v1", COMMIT];
    let is_info = |revision| path == format!("/api/models/org/tiny/revision/{revision}");
    if revisions.into_iter().any(is_info) {
        let names = repository
            .files
            .keys()
            .map(|name| serde_json::json!({ "rfilename": name }));
        let info = serde_json::json!({ "sha": COMMIT, "siblings": names.collect::<Vec<_>>() });
        return reply(&mut stream, "200 OK", "", info.to_string().as_bytes());
    }
    let file = revisions
        .iter()
        .find_map(|revision| path.strip_prefix(&format!("/org/tiny/resolve/{revision}/")));
    let Some((name, bytes)) = file.and_then(|name| repository.files.get_key_value(name)) else {
        return reply(&mut stream, "404 Not Found", "", b"Entry not found");
    };
    let (name, bytes) = (name.clone(), bytes.clone());
    let (first, last) = range
        .strip_prefix("bytes=")
        .and_then(|r| r.split_once('-'))
        .unwrap();
    let first: usize = first.parse().unwrap();
    let end = last
        .parse()
        .map_or(bytes.len(), |last: usize| bytes.len().min(last + 1));
    if first >= end {
        return reply(&mut stream, "416 Range Not Satisfiable", "", b"");
    }
    let extra = format!(
        "x-repo-commit: {COMMIT}\r\netag: \"etag-of-{}\"\r\ncontent-range: bytes {first}-{}/{}\r\n",
        name.replace(['/', '.'], "-"),
        end - 1,
        bytes.len()
    );
    let whole = last.is_empty();
    if whole && repository.interrupted.remove(&name) {
        let half = &bytes[first..first + (end - first) / 2];
        let head = format!("{extra}content-length: {}\r\n", end - first);
        return send(&mut stream, "206 Partial Content", &head, half);
    }
    reply(
        &mut stream,
        "206 Partial Content",
        &extra,
        &bytes[first..end],
    );
}

fn reply(stream: &mut TcpStream, status: &str, extra: &str, body: &[u8]) {
    send(
        stream,
        status,
        &format!("{extra}content-length: {}\r\n", body.len()),
        body,
    );
}

fn send(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) {
    // The client may have gone; then the answer is not needed.
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\n{headers}connection: close\r\n\r\n"
    );
    let _ = stream.write_all(body).and_then(|()| stream.flush());
}

fn fixture() -> PathBuf {
    common::root().join("tests/fixtures/golden/tiny/llama")
}

/// The files of a tiny Llama repository, including some that do not belong to the model.
fn tiny() -> Vec<(String, Vec<u8>)> {
    let read = |name: &str| {
        (
            name.to_owned(),
            std::fs::read(fixture().join(name)).unwrap(),
        )
    };
    let mut files = vec![read("config.json"), read("model.safetensors")];
    for name in ["generation_config.json", "README.md", "onnx/config.json"] {
        files.push((name.to_owned(), b"{}".to_vec()));
    }
    files
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Checks that a command failed with one line on stderr, and returns that line.
fn failure(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{}", stderr(output));
    let text = stderr(output);
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("error: "), "{text}");
    text
}

fn contains_all(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "'{part}' is missing in: {text}");
    }
}

const GENERATE: [&str; 6] = [
    "generate",
    "--prompt-ids",
    "1,2,3",
    "--max-tokens",
    "4",
    "--model",
];

fn generate(hub: &FakeHub, model: &str) -> String {
    stdout(&hub.quell(&[&GENERATE[..], &[model]].concat()))
}

fn is_file_request(request: &str) -> bool {
    request.contains("/resolve/")
}

#[test]
fn a_downloaded_folder_generates_like_the_original() {
    let hub = FakeHub::new(tiny());
    let local = generate(&hub, fixture().to_str().unwrap());
    assert_eq!(local.trim().split(',').count(), 4, "{local}");
    assert_eq!(hub.requests(), [""; 0], "a plain path makes no request");

    assert_eq!(generate(&hub, "hf:org/tiny"), local);
    let asked = hub.requests().join("\n");
    contains_all(
        &asked,
        &[
            "/config.json",
            "/generation_config.json",
            "/model.safetensors",
        ],
    );
    assert!(
        !asked.contains("README") && !asked.contains("onnx"),
        "{asked}"
    );
    for name in ["config.json", "model.safetensors"] {
        let (ours, theirs) = (hub.snapshot().join(name), fixture().join(name));
        assert_eq!(std::fs::read(ours).unwrap(), std::fs::read(theirs).unwrap());
    }
}

#[test]
fn the_second_run_downloads_nothing() {
    let hub = FakeHub::new(tiny());
    stdout(&hub.quell(&["inspect", "hf:org/tiny"]));
    assert!(
        hub.requests()
            .iter()
            .any(|request| is_file_request(request))
    );
    stdout(&hub.quell(&["inspect", "hf:org/tiny"]));
    let again: Vec<_> = hub
        .requests()
        .into_iter()
        .filter(|request| is_file_request(request))
        .collect();
    assert_eq!(again, [""; 0]);
}

#[test]
fn a_cached_model_with_its_tokenizer_makes_no_request() {
    let mut files = tiny();
    files.push(("tokenizer.json".to_owned(), b"not JSON".to_vec()));
    let hub = FakeHub::new(files);
    // The model is downloaded, and then refused because its tokenizer cannot be read.
    let first = failure(&hub.quell(&["inspect", "hf:org/tiny"]));
    contains_all(&first, &["tokenizer.json"]);
    assert!(!hub.requests().is_empty());
    assert_eq!(failure(&hub.quell(&["inspect", "hf:org/tiny"])), first);
    assert_eq!(hub.requests(), [""; 0]);
}

#[test]
fn a_cached_model_works_without_the_hub() {
    let hub = FakeHub::new(tiny());
    let online = generate(&hub, "hf:org/tiny");
    let offline = quell(
        NOWHERE,
        hub.home.path(),
        &[&GENERATE[..], &["hf:org/tiny"]].concat(),
    );
    assert_eq!(stdout(&offline), online);
    assert!(
        stderr(&offline).contains("using the cached model"),
        "{}",
        stderr(&offline)
    );
}

#[test]
fn an_interrupted_transfer_is_resumed() {
    let hub = FakeHub::new(tiny());
    hub.repository
        .lock()
        .unwrap()
        .interrupted
        .insert("model.safetensors".to_owned());
    stdout(&hub.quell(&["inspect", "hf:org/tiny"]));
    let half = std::fs::metadata(fixture().join("model.safetensors"))
        .unwrap()
        .len()
        / 2;
    let rest = format!("model.safetensors bytes={half}-");
    let asked = hub.requests();
    assert!(
        asked.iter().any(|request| request.ends_with(&rest)),
        "{asked:?}"
    );
    assert_eq!(
        std::fs::read(hub.snapshot().join("model.safetensors")).unwrap(),
        std::fs::read(fixture().join("model.safetensors")).unwrap()
    );
}

#[test]
fn shards_are_found_through_their_index() {
    let mut files = tiny();
    let weights = files
        .iter()
        .position(|(name, _)| name == "model.safetensors")
        .unwrap();
    files[weights].0 = "model-00001-of-00001.safetensors".to_owned();
    let header_length = u64::from_le_bytes(files[weights].1[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value =
        serde_json::from_slice(&files[weights].1[8..8 + header_length]).unwrap();
    let map: serde_json::Map<_, _> = header
        .as_object()
        .unwrap()
        .keys()
        .filter(|name| *name != "__metadata__")
        .map(|name| (name.clone(), "model-00001-of-00001.safetensors".into()))
        .collect();
    let index = serde_json::json!({ "metadata": {}, "weight_map": map }).to_string();
    files.push((
        "model.safetensors.index.json".to_owned(),
        index.into_bytes(),
    ));
    let hub = FakeHub::new(files);
    let local = generate(&hub, fixture().to_str().unwrap());
    assert_eq!(generate(&hub, "hf:org/tiny"), local);
}

#[test]
fn an_index_that_names_files_outside_the_repository_is_refused() {
    let mut files = tiny();
    files.retain(|(name, _)| name != "model.safetensors");
    let index = r#"{"weight_map": {"a": "../../outside.safetensors"}}"#;
    files.push(("model.safetensors.index.json".to_owned(), index.into()));
    let hub = FakeHub::new(files);
    let error = failure(&hub.quell(&["inspect", "hf:org/tiny"]));
    contains_all(
        &error,
        &[
            "model.safetensors.index.json",
            "'../../outside.safetensors'",
        ],
    );
    assert!(!hub.requests().join("\n").contains("outside"));
}

#[test]
fn a_single_gguf_file_is_downloaded_alone() {
    let hub = FakeHub::new([("sub/a.gguf".to_owned(), b"no model at all".to_vec())]);
    for _ in 0..2 {
        let error = failure(&hub.quell(&["inspect", "hf:org/tiny@v1/sub/a.gguf"]));
        // The download succeeded: the GGUF reader refuses the file.
        contains_all(&error, &["sub/a.gguf"]);
        assert!(!error.contains("404"), "{error}");
    }
    assert_eq!(
        std::fs::read(hub.snapshot().join("sub/a.gguf")).unwrap(),
        b"no model at all"
    );
    // Two requests, for the size and the content; the second run makes none.
    let asked = hub.requests();
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(
        asked
            .iter()
            .all(|request| request.contains("/resolve/v1/sub/a.gguf")),
        "{asked:?}"
    );
}

#[test]
fn missing_repositories_revisions_and_files_are_reported() {
    let hub = FakeHub::new(tiny());
    let error = failure(&hub.quell(&["inspect", "hf:org/tiny/missing.gguf"]));
    contains_all(
        &error,
        &[
            "404",
            "'missing.gguf'",
            "'org/tiny'",
            "'main'",
            &hub.endpoint,
        ],
    );
    let error = failure(&hub.quell(&["inspect", "hf:org/other"]));
    contains_all(&error, &["404", "'org/other'"]);
    let error = failure(&hub.quell(&["inspect", "hf:org/tiny@v9"]));
    contains_all(&error, &["404", "'org/tiny'", "'v9'"]);
}

#[test]
fn a_repository_of_gguf_files_asks_for_a_file_name() {
    let files = ["config.json", "m.Q4_0.gguf", "m.Q8_0.gguf"];
    let hub = FakeHub::new(files.map(|name| (name.to_owned(), b"{}".to_vec())));
    let error = failure(&hub.quell(&["inspect", "hf:org/tiny"]));
    contains_all(
        &error,
        &[
            "'org/tiny'",
            "model.safetensors",
            "2 GGUF files",
            "m.Q4_0.gguf",
        ],
    );
}

#[test]
fn an_unreachable_hub_is_reported_with_advice() {
    let home = tempfile::tempdir().unwrap();
    for model in ["hf:org/tiny", "hf:org/tiny/a.gguf"] {
        let error = failure(&quell(NOWHERE, home.path(), &["inspect", model]));
        contains_all(
            &error,
            &[NOWHERE, "'org/tiny'", "HF_ENDPOINT", "path of a model"],
        );
    }
}

#[test]
fn a_malformed_name_makes_no_request() {
    let hub = FakeHub::new(tiny());
    let error = failure(&hub.quell(&["inspect", "hf:tiny"]));
    contains_all(&error, &["'hf:tiny'", "expected hf:ORG/NAME"]);
    assert_eq!(hub.requests(), [""; 0]);
}

#[test]
fn the_token_gives_access_to_a_private_repository() {
    let hub = FakeHub::new(tiny());
    hub.repository.lock().unwrap().token = Some("secret");
    let error = failure(&hub.quell(&["inspect", "hf:org/tiny"]));
    contains_all(&error, &["401", "'org/tiny'", "HF_TOKEN"]);
    let mut inspect = command(&hub.endpoint, hub.home.path(), &["inspect", "hf:org/tiny"]);
    stdout(&inspect.env("HF_TOKEN", "secret").output().unwrap());

    // The token file that a login with the hub's own program leaves.
    let other = FakeHub::new(tiny());
    other.repository.lock().unwrap().token = Some("secret");
    std::fs::write(other.home.path().join("token"), "secret\n").unwrap();
    stdout(&other.quell(&["inspect", "hf:org/tiny"]));
}
