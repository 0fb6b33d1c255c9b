//! The page at `/`, in a real browser, served by the real program with the real model.
//!
//! Screenshots are written to `target/page`.

use common::browser::{Browser, client};
use common::model::smollm2;
use common::serve::Serve;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const ENTER: &str = "\u{e007}";
const ESCAPE: &str = "\u{e00c}";

const WIDE: (u32, u32) = (1440, 900);
const PHONE: (u32, u32) = (390, 844);

fn screenshot(name: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    target.join("page").join(format!("{name}.png"))
}

/// Requests, as another client, an answer that does not end within the test. The task returns
/// the events of the answer once it has ended.
fn endless(url: &str, prompt: &str) -> tokio::task::JoinHandle<reqwest::Result<String>> {
    let body = json!({
        "prompt": prompt, "max_tokens": 8000, "stream": true, "ignore_eos": true,
    });
    let request = client().post(format!("{url}/v1/completions"));
    tokio::spawn(async move { request.json(&body).send().await?.text().await })
}

/// A script that makes the page's answers ignore end tokens too, so that only `max-tokens` ends
/// them.
const IGNORE_EOS: &str = "
    const plain = window.fetch;
    window.fetch = (path, options) => {
      if (path !== '/v1/chat/completions') return plain(path, options);
      const body = JSON.stringify({ ...JSON.parse(options.body), ignore_eos: true });
      return plain(path, { ...options, body });
    };";

/// True when no request is open or closing, and no block is held.
const IDLE: &str = "latest && latest.stats.open + latest.stats.closing === 0
    && latest.stats.blocks.referenced === 0";

async fn assert_nothing_overflows(browser: &Browser) {
    let script = "return [document.documentElement.scrollWidth, window.innerWidth]";
    let widths: Vec<u64> = serde_json::from_value(browser.run(script).await).unwrap();
    assert!(widths[0] <= widths[1], "{widths:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_chats_stops_answers_and_cancels_other_requests() {
    let serve = Serve::start(&smollm2(), &[]);
    let browser = Browser::start().await;
    browser.look(WIDE, 1, "light").await;
    browser.open(&serve.url()).await;
    browser
        .until("$('connection').textContent === 'live'")
        .await;
    browser
        .until("$('model').textContent.includes('SmolLM2')")
        .await;

    // An answer, requested with the keyboard.
    browser
        .run("$('temperature').value = 0; $('max-tokens').value = 24; $('input').focus()")
        .await;
    browser
        .press(&format!("Give me three tips for staying healthy.{ENTER}"))
        .await;
    browser.until("!answering && messages.length === 2").await;
    let answer = browser.run("return messages[1]").await;
    assert!(
        answer["content"].as_str().unwrap().contains("hydrated"),
        "{answer}"
    );
    let about = answer["about"].as_str().unwrap();
    assert!(
        about.contains("tokens") && about.contains("first after"),
        "{about}"
    );
    browser.until(IDLE).await;

    // An answer that is stopped half-way: its blocks are released and its text stays.
    browser.run(IGNORE_EOS).await;
    browser
        .run("$('max-tokens').value = 4000; $('input').focus()")
        .await;
    browser
        .press(&format!("Tell me a long story about the sea.{ENTER}"))
        .await;
    browser
        .until("$('log').lastElementChild.querySelector('.text').textContent.length > 20")
        .await;
    browser.until("latest.requests.some(isOwn)").await;
    browser.press(ESCAPE).await;
    browser.until("!answering && messages.length === 4").await;
    let stopped = browser.run("return messages[3]").await;
    assert!(
        stopped["about"].as_str().unwrap().ends_with("stopped"),
        "{stopped}"
    );
    browser.until(IDLE).await;
    let reason = browser.run("return latest.recent_ends[0].reason").await;
    assert_eq!(reason, "disconnect");
    browser
        .until("$('ends').tBodies[0].rows[0].innerText.includes('client went away')")
        .await;

    // A request of another client, cancelled with its button.
    let other = endless(&serve.url(), "Once upon a time");
    let id = browser
        .until("latest.requests[0]?.generated_tokens > 8 && latest.requests[0].id")
        .await;
    browser
        .run("$('requests').querySelector('button').focus()")
        .await;
    assert_eq!(
        browser.run("return map.owner").await,
        id,
        "the blocks of the request are shown"
    );
    assert!(browser.run("return map.owned.size").await.as_u64().unwrap() > 0);
    browser.press(ENTER).await;
    let said = browser
        .until(
            "$('announcement').textContent.includes('cancelled') && $('announcement').textContent",
        )
        .await;
    let said = said.as_str().unwrap();
    assert!(
        said.contains(&format!("Request {id} is cancelled: ")),
        "{said}"
    );
    let events = other.await.unwrap().unwrap();
    assert!(events.contains("\"finish_reason\":\"abort\""), "{events}");
    browser.until(IDLE).await;
    browser
        .until("rows.size === 0 && document.activeElement.id === 'requests-title'")
        .await;
    let end = browser.run("return latest.recent_ends[0]").await;
    assert_eq!((&end["id"], &end["reason"]), (&id, &json!("explicit")));
    let freed = end["blocks_freed"].as_u64().unwrap();
    assert!(
        freed > 0 && said.contains(&format!(" {freed} block")),
        "{said}: {end}"
    );

    // A busy engine, in every layout and colour scheme.
    let stories = [
        "Once upon a time",
        "The sea",
        "In the year 3000",
        "My recipe for bread is",
    ];
    let others: Vec<_> = stories.map(|story| endless(&serve.url(), story)).into();
    browser.run("$('input').focus()").await;
    browser.press(&format!("Why is the sky blue?{ENTER}")).await;
    browser
        .until("latest.requests.length === 5 && latest.requests.some(isOwn)")
        .await;
    browser
        .until("$('log').lastElementChild.querySelector('.text').textContent.length > 200")
        .await;
    for (name, size, scale, scheme) in [
        ("light", WIDE, 1, "light"),
        ("dark", WIDE, 1, "dark"),
        ("phone", PHONE, 2, "light"),
        ("phone-dark", PHONE, 2, "dark"),
    ] {
        browser.look(size, scale, scheme).await;
        assert_nothing_overflows(&browser).await;
        let dark = browser
            .run("return matchMedia('(prefers-color-scheme: dark)').matches")
            .await;
        assert_eq!(dark, Value::Bool(scheme == "dark"));
        browser.screenshot(&screenshot(name)).await;
        if size == PHONE {
            browser.run("$('engine').scrollIntoView()").await;
            browser
                .screenshot(&screenshot(&format!("{name}-engine")))
                .await;
            browser.run("scrollTo(0, 0)").await;
        }
    }
    browser.press(ESCAPE).await;
    for other in others {
        other.abort();
    }
    browser.until(IDLE).await;
    browser.until("!answering && messages.length === 6").await;

    // The conversation survives a reload, and a new one starts empty.
    browser.look(WIDE, 1, "light").await;
    browser.open(&serve.url()).await;
    browser
        .until("document.querySelectorAll('#log .user').length === 3")
        .await;
    browser.run("$('new').click()").await;
    browser
        .until("!$('welcome').hidden && messages.length === 0")
        .await;
    assert_eq!(browser.complaints().await, Vec::<String>::new());
}

/// Returns the number of processes with this text in their command line.
#[cfg(target_os = "linux")]
fn processes_with(argument: &str) -> usize {
    let processes = std::fs::read_dir("/proc").unwrap().map(Result::unwrap);
    let told = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    told.filter(|told| String::from_utf8_lossy(told).contains(argument))
        .count()
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_dropped_browser_leaves_no_process() {
    let browser = Browser::start().await;
    let profile = browser.profile().to_str().unwrap().to_owned();
    assert!(processes_with(&profile) > 0);
    drop(browser);
    let begun = std::time::Instant::now();
    while processes_with(&profile) > 0 {
        assert!(
            begun.elapsed().as_secs() < 60,
            "the browser is still running"
        );
        std::thread::yield_now();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_asks_for_a_key_if_the_server_requires_one() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "sesame\n").unwrap();
    let serve = Serve::start(
        &smollm2(),
        &["--admin-key-file", keys.path().to_str().unwrap()],
    );
    let browser = Browser::start().await;
    browser.open(&serve.url()).await;
    for (key, open) in [("simsim", true), ("sesame", false)] {
        browser
            .until("$('key-dialog').open && document.activeElement.id === 'key'")
            .await;
        browser.press(&format!("{key}{ENTER}")).await;
        if open {
            browser
                .until("sessionStorage.getItem('key') === 'simsim' && $('key-dialog').open")
                .await;
        }
    }
    browser
        .until("$('connection').textContent === 'live' && !$('key-dialog').open")
        .await;
    chat(&browser).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_lets_a_key_chat_that_may_not_see_the_engine() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "visitor\n").unwrap();
    let serve = Serve::start(
        &smollm2(),
        &["--api-key-file", keys.path().to_str().unwrap()],
    );
    let browser = Browser::start().await;
    browser.open(&serve.url()).await;
    browser
        .until("$('key-dialog').open && document.activeElement.id === 'key'")
        .await;
    browser.press(&format!("visitor{ENTER}")).await;
    browser
        .until("$('connection').textContent.startsWith('chat only') && !$('key-dialog').open")
        .await;
    chat(&browser).await;
}

/// Asks for a short answer on the page, and waits for it.
async fn chat(browser: &Browser) {
    browser
        .run("$('max-tokens').value = 4; $('input').focus()")
        .await;
    browser.press(&format!("Hello{ENTER}")).await;
    browser.until("!answering && messages.length === 2").await;
}

/// Serves a page of another site while the test process runs, and returns its origin.
fn other_site() -> String {
    use std::io::{BufRead, BufReader, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let origin = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let mut line = String::new();
            while stream.read_line(&mut line).is_ok_and(|read| read > 2) {
                line.clear();
            }
            let page = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 3\r\n\
                        Connection: close\r\n\r\n<p>";
            let _ = stream.get_mut().write_all(page.as_bytes());
        }
    });
    origin
}

/// Fetches a URL from the page and returns the status and type of the response, or `failed` and
/// the error's name.
async fn fetched(browser: &Browser, url: &str, options: Value) -> Value {
    let start = format!(
        "window.fetched = null;
         fetch('{url}', {options}).then(
           (answer) => {{ window.fetched = [answer.status, answer.type]; }},
           (error) => {{ window.fetched = ['failed', error.name]; }});"
    );
    browser.run(&start).await;
    browser.until("window.fetched").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_other_sites_use_the_server_only_if_their_origin_is_allowed() {
    let site = other_site();
    let closed = Serve::start(&smollm2(), &[]);
    let open = Serve::start(&smollm2(), &["--allowed-origins", &site]);
    let browser = Browser::start().await;
    browser.open(&site).await;
    let body = json!({"prompt": "Hi", "max_tokens": 1}).to_string();
    // Headers that OpenAI's JavaScript client sends.
    let names = [
        "arch",
        "lang",
        "os",
        "package-version",
        "retry-count",
        "runtime",
        "timeout",
    ];
    let mut headers = json!({
        "Authorization": "Bearer none", "Content-Type": "application/json",
        "OpenAI-Organization": "o", "OpenAI-Project": "p", "OpenAI-Beta": "b",
        "Idempotency-Key": "1", "X-API-Key": "none",
    });
    for name in names {
        headers[format!("X-Stainless-{name}")] = json!("x");
    }
    let sdk = json!({"method": "POST", "headers": headers, "body": body});
    // A request that needs no CORS preflight.
    let simple = json!({"method": "POST", "mode": "no-cors", "body": body});
    let path = |serve: &Serve| format!("{}/v1/completions", serve.url());
    assert_eq!(
        fetched(&browser, &path(&open), sdk.clone()).await,
        json!([200, "cors"])
    );
    let refused = fetched(&browser, &path(&closed), sdk).await;
    assert_eq!(refused[0], "failed", "{refused}");
    // The page cannot see the response, but the server did send one.
    let answered = fetched(&browser, &path(&closed), simple).await;
    assert_eq!(answered, json!([0, "opaque"]));
    assert_eq!(closed.metric("quell_prompt_tokens_total"), 0.0);
    assert!(open.metric("quell_prompt_tokens_total") > 0.0);
}
