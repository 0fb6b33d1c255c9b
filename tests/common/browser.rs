//! A headless Chromium, driven through WebDriver (<https://www.w3.org/TR/webdriver2/>).

#![allow(dead_code)] // each test file uses its part

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// How long what is waited for may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the browser is started with: no window, no network of its own.
const ARGUMENTS: [&str; 9] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
];

/// A driver and the port where it listens. None if it has ended: it takes a free port, and
/// fails if somebody else has the same port of the other kind of address, IPv4 or IPv6.
fn start_driver() -> Option<(Child, u16)> {
    let mut driver = Command::new("chromedriver")
        .arg("--port=0")
        .stdout(Stdio::piped())
        .spawn()
        .expect("chromedriver is missing: run scripts/setup-browser");
    let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
    let port = lines.by_ref().find_map(|line| {
        let line = line.unwrap();
        let (_, port) = line.split_once("successfully on port ")?;
        port.trim_end_matches('.').parse().ok()
    });
    let Some(port) = port else {
        driver.wait().unwrap();
        return None;
    };
    // It goes on writing.
    std::thread::spawn(move || lines.for_each(drop));
    Some((driver, port))
}

/// A client of HTTP.
pub fn client() -> reqwest::Client {
    // It wants a provider of TLS even where it uses none; who comes first installs it.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::new()
}

/// A browser with one page; it is closed when it is dropped.
pub struct Browser {
    driver: Child,
    client: reqwest::Client,
    port: u16,
    /// Where its commands go.
    session: String,
    /// What it writes, a folder of its own.
    profile: TempDir,
}

impl Browser {
    /// Starts it; `scripts/setup-browser` installs what this needs.
    pub async fn start() -> Self {
        let (driver, port) = (0..8)
            .find_map(|_| start_driver())
            .expect("chromedriver says where it listens");
        let profile = TempDir::new().unwrap();
        let folder = format!("--user-data-dir={}", profile.path().display());
        let arguments: Vec<&str> = ARGUMENTS.into_iter().chain([folder.as_str()]).collect();
        let mut browser = Self {
            driver,
            client: client(),
            port,
            session: format!("http://127.0.0.1:{port}/session"),
            profile,
        };
        let wanted = json!({"alwaysMatch": {
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
            "timeouts": {"script": PATIENCE.as_millis() as u64},
        }});
        let session = browser.post("", json!({"capabilities": wanted})).await;
        let id = session["sessionId"].as_str().unwrap();
        browser.session = format!("{}/{id}", browser.session);
        browser
    }

    /// The folder of what it writes, which its processes are told.
    pub fn profile(&self) -> &Path {
        self.profile.path()
    }

    /// Has it end: it would outlive its driver.
    fn quit(&self) -> std::io::Result<()> {
        let mut connection = TcpStream::connect(("127.0.0.1", self.port))?;
        connection.set_read_timeout(Some(PATIENCE))?;
        let session = self.session.rsplit('/').next().unwrap_or_default();
        write!(
            connection,
            "DELETE /session/{session} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        )?;
        // It answers when the browser has ended.
        connection.read(&mut [0]).map(drop)
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        let request = self.client.post(format!("{}{path}", self.session));
        let response = request.json(&body).send().await.unwrap();
        let ok = response.status().is_success();
        let answer: Value = response.json().await.unwrap();
        assert!(ok, "{path}: {}", answer["value"]["message"]);
        answer["value"].clone()
    }

    /// Goes to a page.
    pub async fn open(&self, url: &str) {
        self.post("/url", json!({"url": url})).await;
    }

    /// What a function's body returns in the page.
    pub async fn run(&self, script: &str) -> Value {
        let body = json!({"script": script, "args": []});
        self.post("/execute/sync", body).await
    }

    /// Waits until an expression is true in the page, and gives what it is then.
    pub async fn until(&self, expression: &str) -> Value {
        let script = format!(
            "const done = arguments[0];
             const check = () => {{
               const value = ({expression});
               value ? done(value) : setTimeout(check, 20);
             }};
             check();"
        );
        let body = json!({"script": script, "args": []});
        let request = self.client.post(format!("{}/execute/async", self.session));
        let answer: Value = request
            .json(&body)
            .send()
            .await
            .unwrap()
            .json()
            .await
            .unwrap();
        let value = answer["value"].clone();
        if value["error"].is_string() {
            let page = self.run("return document.body.innerText").await;
            panic!("it never came to be: {expression}\n{value}\n{page}");
        }
        value
    }

    /// Presses keys where the page has its focus.
    pub async fn press(&self, keys: &str) {
        let each = keys.chars().flat_map(|key| {
            ["keyDown", "keyUp"].map(|kind| json!({"type": kind, "value": key.to_string()}))
        });
        let keyboard =
            json!({"type": "key", "id": "keyboard", "actions": each.collect::<Vec<_>>()});
        self.post("/actions", json!({"actions": [keyboard]})).await;
    }

    /// A window of this size, in CSS pixels, for someone who likes it light or dark.
    pub async fn look(&self, (width, height): (u32, u32), scale: u32, scheme: &str) {
        let command = |name: &str, parameters: Value| {
            self.post(
                "/goog/cdp/execute",
                json!({"cmd": name, "params": parameters}),
            )
        };
        let metrics = json!({
            "width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600,
        });
        command("Emulation.setDeviceMetricsOverride", metrics).await;
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        command("Emulation.setEmulatedMedia", json!({"features": features})).await;
    }

    /// Writes what is to be seen to a PNG file.
    pub async fn screenshot(&self, path: &Path) {
        let url = format!("{}/screenshot", self.session);
        let answer: Value = self
            .client
            .get(url)
            .send()
            .await
            .unwrap()
            .json()
            .await
            .unwrap();
        let image = BASE64_STANDARD
            .decode(answer["value"].as_str().unwrap())
            .unwrap();
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, image).unwrap();
    }

    /// What the page has complained of since the last call.
    pub async fn complaints(&self) -> Vec<String> {
        let log = self.post("/se/log", json!({"type": "browser"})).await;
        let entries = log.as_array().unwrap().iter();
        entries
            .map(|entry| entry["message"].as_str().unwrap().to_owned())
            .collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.quit();
        let _ = Command::new("kill")
            .arg(self.driver.id().to_string())
            .status();
        let _ = self.driver.wait();
    }
}
