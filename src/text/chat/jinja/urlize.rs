//! jinja2's filter `urlize`, which turns web and mail addresses into links.

use super::arguments::Arguments;
use super::python::{bounded, failed, is_space, items, text};
use super::text_filters::escape;
use minijinja::Error;
use minijinja::value::Value;
use regex::Regex;
use std::sync::LazyLock;

/// A pattern of Python's `re`, in which `\w` and `\S` have Python's meaning.
fn pattern(python: &str) -> Option<Regex> {
    // White space is split off before words are matched, so that `\S` is any character.
    let rust = python
        .replace(r"[\w", r"[\p{L}\p{N}_")
        .replace(r"\w", r"[\p{L}\p{N}_]")
        .replace(r"\S", r"[\s\S]");
    Regex::new(&rust).ok()
}

/// A web address: a scheme or `www.` with a host, a host with one of the oldest top-level
/// domains, or a scheme with an IP address; then a port, and then a path.
static WEB: LazyLock<Option<Regex>> = LazyLock::new(|| {
    // Where case is ignored, Python takes `ı` and `İ` for an `i` as well.
    pattern(
        r"(?ix) ^ (?:
            (?: https?:// | www\. ) (?: [\w%-]+ \. )* (?: [a-zıİ]{2,63} | xn-- [\w%]{2,59} )
            | (?: [\w%-]{2,63} \. )+ (?: com|net|[iıİ]nt|edu|gov|org|[iıİ]nfo|m[iıİ]l )
            | https?:// (?:
                \d{1,3} (?: \.\d{1,3} ){3}
                | \[ (?: [\da-f]{0,4} : ){2} (?: [\da-f]{0,4} :? ){1,6} \]
            )
        ) (?: : \d{1,5} )? (?: [/?\#] \S* )? $",
    )
});

static EMAIL: LazyLock<Option<Regex>> = LazyLock::new(|| pattern(r"^\S+@\w[\w.-]*\.\w+$"));

static SCHEME: LazyLock<Option<Regex>> = LazyLock::new(|| pattern(r"^[\w.+-]{2,}:/{0,2}$"));

fn matches(pattern: &LazyLock<Option<Regex>>, text: &str) -> bool {
    pattern
        .as_ref()
        .is_some_and(|pattern| pattern.is_match(text))
}

/// Punctuation that is not part of an address if it precedes it.
const BEFORE: [&str; 3] = ["(", "<", "&lt;"];

/// Punctuation that is not part of an address if it follows it.
const AFTER: [&str; 6] = [")", ">", ".", ",", "\n", "&gt;"];

/// The brackets that are part of an address if both are in it.
const BRACKETS: [(&str, &str); 3] = [("(", ")"), ("<", ">"), ("&lt;", "&gt;")];

/// How links are written.
struct Links {
    /// Maximum number of characters that are shown of a web address; if negative, the number of
    /// characters that are not shown.
    limit: Option<i64>,
    /// The attributes after `href`.
    attributes: String,
    /// Further schemes of addresses, such as `git:`.
    schemes: Vec<String>,
}

/// Escapes the text for HTML, and turns the addresses in it into links.
pub(super) fn urlize(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let links = Links::of(arguments)?;
    let escaped = match value.is_safe() {
        true => text(value)?,
        false => escape(&text(value)?),
    };
    let mut out = String::new();
    for word in escaped.split_inclusive(is_space) {
        let bare = word.strip_suffix(is_space).unwrap_or(word);
        links.write(bare, &mut out);
        out.push_str(&word[bare.len()..]);
        bounded(out.len())?;
    }
    Ok(out.into())
}

impl Links {
    fn of(arguments: &mut Arguments) -> Result<Self, Error> {
        let limit = arguments.integer("trim_url_limit")?;
        let no_follow = arguments.flag("nofollow")?;
        let target = arguments.string("target")?;
        let rel = arguments.string("rel")?.unwrap_or_default();
        let schemes = match arguments.next("extra_schemes")? {
            Some(schemes) if schemes.is_true() => {
                let schemes = items(&schemes)?;
                schemes.iter().map(text).collect::<Result<Vec<_>, _>>()?
            }
            _ => Vec::new(),
        };
        if let Some(scheme) = schemes.iter().find(|scheme| !matches(&SCHEME, scheme)) {
            return Err(failed(format!(
                "{scheme:?} is not a valid URI scheme prefix."
            )));
        }
        let mut relations: Vec<&str> = rel.split(is_space).filter(|one| !one.is_empty()).collect();
        relations.push("noopener");
        relations.extend(no_follow.then_some("nofollow"));
        relations.sort_unstable();
        relations.dedup();
        let mut attributes = format!(" rel=\"{}\"", escape(&relations.join(" ")));
        if let Some(target) = target.filter(|target| !target.is_empty()) {
            attributes += &format!(" target=\"{}\"", escape(&target));
        }
        Ok(Self {
            limit,
            attributes,
            schemes,
        })
    }

    /// Appends a word, which may be an address between punctuation.
    fn write(&self, word: &str, out: &mut String) {
        let (head, middle, tail) = parts(word);
        out.push_str(head);
        self.write_middle(middle, out);
        out.push_str(tail);
    }

    fn write_middle(&self, middle: &str, out: &mut String) {
        let attributes = &self.attributes;
        if matches(&WEB, middle) {
            let known = middle.starts_with("https://") || middle.starts_with("http://");
            let scheme = if known { "" } else { "https://" };
            let shown = self.shown(middle);
            *out += &format!("<a href=\"{scheme}{middle}\"{attributes}>{shown}</a>");
            return;
        }
        let mail = middle
            .strip_prefix("mailto:")
            .filter(|mail| matches(&EMAIL, mail));
        if let Some(mail) = mail {
            *out += &format!("<a href=\"{middle}\">{mail}</a>");
            return;
        }
        let bare = !middle.starts_with("www.") && !middle.starts_with('@');
        if bare && !middle.contains(':') && matches(&EMAIL, middle) {
            *out += &format!("<a href=\"mailto:{middle}\">{middle}</a>");
            return;
        }
        let begins = |scheme: &&String| middle != **scheme && middle.starts_with(&***scheme);
        match self.schemes.iter().find(begins) {
            Some(_) => *out += &format!("<a href=\"{middle}\"{attributes}>{middle}</a>"),
            None => out.push_str(middle),
        }
    }

    /// Returns what a link to a web address shows of it.
    fn shown(&self, address: &str) -> String {
        let length = address.chars().count();
        let Some(limit) = self.limit else {
            return address.to_owned();
        };
        let kept = match usize::try_from(limit) {
            Ok(limit) if length <= limit => return address.to_owned(),
            Ok(limit) => limit,
            Err(_) => {
                length.saturating_sub(usize::try_from(limit.unsigned_abs()).unwrap_or(length))
            }
        };
        address.chars().take(kept).chain("...".chars()).collect()
    }
}

/// Splits a word into the punctuation before an address, the address, and the punctuation after
/// it. Closing brackets belong to the address as far as it contains the opening ones.
fn parts(word: &str) -> (&str, &str, &str) {
    let mut middle = word;
    while let Some(rest) = BEFORE.iter().find_map(|mark| middle.strip_prefix(mark)) {
        middle = rest;
    }
    let (head, body) = word.split_at(word.len() - middle.len());
    while let Some(rest) = AFTER.iter().find_map(|mark| middle.strip_suffix(mark)) {
        middle = rest;
    }
    let mut end = middle.len();
    for (open, close) in BRACKETS {
        let count = |text: &str, mark: &str| text.matches(mark).count();
        let opened = count(&body[..end], open);
        if opened <= count(&body[..end], close) {
            continue;
        }
        for _ in 0..opened.min(count(&body[end..], close)) {
            if let Some(at) = body[end..].find(close) {
                end += at + close.len();
            }
        }
    }
    (head, &body[..end], &body[end..])
}
