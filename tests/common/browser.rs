//! A headless Chromium, driven through WebDriver (<https://www.w3.org/TR/webdriver2/>).

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// How long a script in the page, or the end of the browser, may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Command-line arguments of the browser: no window, and no background network traffic.
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

/// Starts a driver and returns it with its port. Returns `None` if the driver has exited: it
/// picks a free port, and fails if another process already uses that port on the other IP
/// version.
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
    // Keep draining stdout, so that the driver cannot block on a full pipe.
    std::thread::spawn(move || lines.for_each(drop));
    Some((driver, port))
}

/// Returns an HTTP client.
pub fn client() -> reqwest::Client {
    // reqwest needs a TLS provider even for plain HTTP. An error here means that one is already
    // installed.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::new()
}

/// A browser with one page. It is closed when it is dropped.
pub struct Browser {
    driver: Child,
    client: reqwest::Client,
    port: u16,
    /// URL of the WebDriver session.
    session: String,
    /// The user data directory, which only this browser uses.
    profile: TempDir,
}

impl Browser {
    /// Starts a browser. Needs what `scripts/setup-browser` installs.
    pub async fn start() -> Self {
        let (driver, port) = (0..8)
            .find_map(|_| start_driver())
            .expect("chromedriver prints its port");
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

    /// The user data directory. It appears in the command lines of the browser's processes.
    pub fn profile(&self) -> &Path {
        self.profile.path()
    }

    /// Ends the WebDriver session, and with it the browser, which would otherwise outlive its
    /// driver.
    fn quit(&self) -> std::io::Result<()> {
        let mut connection = TcpStream::connect(("127.0.0.1", self.port))?;
        connection.set_read_timeout(Some(PATIENCE))?;
        let session = self.session.rsplit('/').next().unwrap_or_default();
        write!(
            connection,
            "DELETE /session/{session} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        )?;
        // The response arrives once the browser has exited.
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

    /// Navigates to a URL.
    pub async fn open(&self, url: &str) {
        self.post("/url", json!({"url": url})).await;
    }

    /// Runs the body of a JavaScript function in the page and returns its result.
    pub async fn run(&self, script: &str) -> Value {
        let body = json!({"script": script, "args": []});
        self.post("/execute/sync", body).await
    }

    /// Waits until an expression is truthy in the page and returns its value.
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
            panic!("this never became true: {expression}\n{value}\n{page}");
        }
        value
    }

    /// Types keys into the focused element.
    pub async fn press(&self, keys: &str) {
        let each = keys.chars().flat_map(|key| {
            ["keyDown", "keyUp"].map(|kind| json!({"type": kind, "value": key.to_string()}))
        });
        let keyboard =
            json!({"type": "key", "id": "keyboard", "actions": each.collect::<Vec<_>>()});
        self.post("/actions", json!({"actions": [keyboard]})).await;
    }

    /// Sets the viewport size in CSS pixels, the device pixel ratio and the preferred colour
    /// scheme.
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

    /// Writes a screenshot of the viewport to a PNG file.
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

    /// Returns the messages that the page has logged to the console since the last call.
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
