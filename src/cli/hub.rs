//! Models named `hf:ORG/NAME`: downloaded once from a Hugging Face hub, then found in its cache.
//!
//! The cache is the one that the other programs of that hub use: `HF_HOME` moves it,
//! `HF_ENDPOINT` names another hub, and `HF_TOKEN` opens repositories that ask for it.
//! A branch's name in the cache is written after the last file of its commit, so that
//! a folder that is found there was downloaded to its end.

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::api::{Progress, RepoInfo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Deserialize;
use std::cell::Cell;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use thiserror::Error;

const PREFIX: &str = "hf:";
const ENDPOINT: &str = "https://huggingface.co";
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// How often a download that breaks off is taken up again.
const ATTEMPTS: usize = 3;

/// Why a model could not be fetched from a hub.
#[derive(Debug, Error)]
pub enum HubError {
    /// The name does not follow the form.
    #[error(
        "'{PREFIX}{name}' names no model: {problem}; expected {PREFIX}ORG/NAME or \
         {PREFIX}ORG/NAME/FILE.gguf, with @REVISION after NAME to pin one"
    )]
    Malformed {
        /// What follows `hf:`.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The hub knows no such repository, revision or file.
    #[error("{endpoint} has no {what} (404); check the spelling")]
    NotFound {
        /// The hub.
        endpoint: String,
        /// The file, repository and revision.
        what: What,
    },
    /// The hub wants to know who asks.
    #[error(
        "{endpoint} refuses {what} ({status}): it does not exist, is private or asks for \
         consent; accept its terms there and set HF_TOKEN"
    )]
    Refused {
        /// The hub.
        endpoint: String,
        /// The file, repository and revision.
        what: What,
        /// The HTTP status.
        status: u16,
    },
    /// The hub answered with another error.
    #[error("{endpoint} answered the request for {what} with status {status}; try again later")]
    Status {
        /// The hub.
        endpoint: String,
        /// The file, repository and revision.
        what: What,
        /// The HTTP status.
        status: u16,
    },
    /// The hub cannot be reached.
    #[error(
        "cannot reach {endpoint} for {what}: {source}; check the network, set HF_ENDPOINT to a \
         mirror, or give the path of a model that is already here"
    )]
    Network {
        /// The hub.
        endpoint: String,
        /// The file, repository and revision.
        what: What,
        /// What went wrong.
        source: Box<ureq::Error>,
    },
    /// The transfer of a file broke off, or the file could not be written.
    #[error("the download of {what} broke off: {source}; the next try goes on from there")]
    Transfer {
        /// The file, repository and revision.
        what: What,
        /// What went wrong.
        source: std::io::Error,
    },
    /// The hub's answer makes no sense.
    #[error("{endpoint} gave an answer about {what} that makes no sense: {problem}")]
    Answer {
        /// The hub.
        endpoint: String,
        /// The file, repository and revision.
        what: What,
        /// What is wrong with it.
        problem: String,
    },
    /// A file arrived with another size than the hub had announced.
    #[error("{what} arrived with {found} bytes, expected {expected}; it was discarded, try again")]
    Size {
        /// The file, repository and revision.
        what: What,
        /// Bytes that arrived.
        found: u64,
        /// Bytes announced.
        expected: u64,
    },
    /// Another process is at the same file.
    #[error("another process is downloading {what}; try again when it is done")]
    Locked {
        /// The file, repository and revision.
        what: What,
    },
    /// The repository has no weights in a format that a folder is loaded from.
    #[error("{what} has no {WEIGHTS}{}", gguf_hint(.gguf))]
    NoWeights {
        /// The repository and revision.
        what: What,
        /// The GGUF files that it has.
        gguf: Vec<String>,
    },
    /// There is no place for the cache.
    #[error("there is no home folder to keep downloads in; set HF_HOME to a folder")]
    NoHome,
}

impl HubError {
    fn is_network(&self) -> bool {
        matches!(self, Self::Network { .. })
    }
}

fn gguf_hint(files: &[String]) -> String {
    match files.first() {
        None => ", which a model is loaded from".to_owned(),
        Some(file) => {
            format!(
                ", but {} GGUF files; name one of them, such as {file}",
                files.len()
            )
        }
    }
}

/// A file or a whole repository, as errors name it.
#[derive(Clone, Debug)]
pub struct What {
    file: Option<String>,
    repository: String,
    revision: String,
}

impl std::fmt::Display for What {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(file) = &self.file {
            write!(formatter, "file '{file}' in ")?;
        }
        write!(
            formatter,
            "repository '{}' at revision '{}'",
            self.repository, self.revision
        )
    }
}

/// The path of a model: `model` itself, or where the download of `hf:ORG/NAME`,
/// `hf:ORG/NAME@REVISION` (a folder) or `hf:ORG/NAME/FILE.gguf` (a file) lies.
///
/// What the cache holds is not asked for again. `progress` shows a bar a file on
/// stderr.
pub fn resolve(model: &str, progress: bool) -> Result<PathBuf, HubError> {
    let Some(name) = model.strip_prefix(PREFIX) else {
        return Ok(PathBuf::from(model));
    };
    let name = ModelName::parse(name)?;
    let hub = Hub::from_env(progress)?;
    match &name.file {
        Some(file) => hub.single_file(&name, file),
        None => hub.folder(&name),
    }
}

/// What `hf:` is followed by, taken apart.
#[derive(Clone, Debug, PartialEq)]
struct ModelName {
    /// `ORG/NAME`.
    repository: String,
    /// A branch, a tag or a commit.
    revision: String,
    /// A GGUF file's path; a whole folder is meant if `None`.
    file: Option<String>,
}

impl ModelName {
    fn parse(name: &str) -> Result<Self, HubError> {
        let malformed = |problem| HubError::Malformed {
            name: name.to_owned(),
            problem,
        };
        let (place, pinned) = match name.split_once('@') {
            Some((place, pinned)) => (place, Some(pinned)),
            None => (name, None),
        };
        let mut parts = place.splitn(3, '/');
        let (Some(org), Some(repo)) = (parts.next(), parts.next()) else {
            return Err(malformed("there is no '/' between organisation and name"));
        };
        let mut file = parts.next();
        let mut revision = "main";
        if let Some(pinned) = pinned {
            if file.is_some() {
                return Err(malformed("the revision belongs right after the name"));
            }
            (revision, file) = split_revision(pinned);
        }
        let mut segments = [org, repo].into_iter().chain(revision.split('/'));
        if !segments.all(is_segment) || !file.is_none_or(|file| file.split('/').all(is_segment)) {
            return Err(malformed(
                "a part of it is empty or has characters that names don't have",
            ));
        }
        if file.is_some_and(|file| !is_gguf(file)) {
            return Err(malformed("a single file must be a .gguf file"));
        }
        Ok(Self {
            repository: format!("{org}/{repo}"),
            revision: revision.to_owned(),
            file: file.map(str::to_owned),
        })
    }

    fn repo(&self) -> Repo {
        repo_at(&self.repository, &self.revision)
    }

    fn what(&self, file: Option<&str>) -> What {
        What {
            file: file.map(str::to_owned),
            repository: self.repository.clone(),
            revision: self.revision.clone(),
        }
    }
}

/// `REVISION[/FILE.gguf]`; revisions such as `refs/pr/1` have slashes of their own.
fn split_revision(pinned: &str) -> (&str, Option<&str>) {
    let slashes = if pinned.starts_with("refs/") { 3 } else { 1 };
    match pinned.match_indices('/').nth(slashes - 1) {
        Some((end, _)) if is_gguf(pinned) => (&pinned[..end], Some(&pinned[end + 1..])),
        _ => (pinned, None),
    }
}

fn is_gguf(file: &str) -> bool {
    file.to_ascii_lowercase().ends_with(".gguf")
}

/// Whether it can be a part of a name, an address and a path, with the same meaning.
fn is_segment(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+=,".contains(&byte);
    !matches!(text, "" | "." | "..") && text.bytes().all(allowed)
}

fn is_commit(text: &str) -> bool {
    text.len() >= 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn repo_at(repository: &str, revision: &str) -> Repo {
    Repo::with_revision(repository.to_owned(), RepoType::Model, revision.to_owned())
}

/// Whether a file of a repository belongs to a model, besides its weights.
fn is_wanted(file: &str) -> bool {
    let alone = [CONFIG, "generation_config.json", "special_tokens_map.json"];
    let families = ["tokenizer", "chat_template."];
    is_segment(file)
        && (alone.contains(&file) || families.iter().any(|start| file.starts_with(start)))
}

/// The list of a sharded model's tensors.
#[derive(Deserialize)]
struct WeightsIndex {
    /// The file that each tensor is in.
    weight_map: HashMap<String, String>,
}

impl WeightsIndex {
    fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        serde_json::from_str(&text).map_err(|error| error.to_string())
    }

    fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

/// Whether a folder has a model's configuration and all its weights.
fn has_model(folder: &Path) -> bool {
    let index = folder.join(WEIGHTS_INDEX);
    let weights = folder.join(WEIGHTS).is_file()
        || WeightsIndex::read(&index).is_ok_and(|index| {
            index
                .shards()
                .iter()
                .all(|shard| folder.join(shard).is_file())
        });
    weights && folder.join(CONFIG).is_file()
}

/// A hub and the cache of what came from it.
struct Hub {
    api: Api,
    cache: Cache,
    endpoint: String,
    progress: bool,
}

impl Hub {
    fn from_env(progress: bool) -> Result<Self, HubError> {
        let set = |name| {
            std::env::var(name)
                .ok()
                .filter(|value: &String| !value.trim().is_empty())
        };
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let home = match set("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => std::env::home_dir()
                .ok_or(HubError::NoHome)?
                .join(".cache/huggingface"),
        };
        let cache = Cache::new(home.join("hub"));
        let token = set("HF_TOKEN")
            .map(|token| token.trim().to_owned())
            .or_else(|| cache.token());
        let built = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(endpoint.clone())
            .with_token(token)
            .with_user_agent("quell", env!("CARGO_PKG_VERSION"))
            .build();
        let api = built.map_err(|error| HubError::Answer {
            endpoint: endpoint.clone(),
            what: What {
                file: None,
                repository: String::new(),
                revision: String::new(),
            },
            problem: error.to_string(),
        })?;
        Ok(Self {
            api,
            cache,
            endpoint,
            progress,
        })
    }

    /// One file of a repository.
    fn single_file(&self, name: &ModelName, file: &str) -> Result<PathBuf, HubError> {
        let cached = self.snapshot(name).map(|folder| folder.join(file));
        match cached.filter(|path| path.is_file()) {
            Some(path) => Ok(path),
            None => self.download(name, &name.revision, file),
        }
    }

    /// A whole model.
    fn folder(&self, name: &ModelName) -> Result<PathBuf, HubError> {
        let cached = self.snapshot(name).filter(|folder| has_model(folder));
        // Without a tokenizer it may be what another program needed of the model.
        if let Some(folder) = cached
            .as_ref()
            .filter(|folder| folder.join(TOKENIZER).is_file())
        {
            return Ok(folder.clone());
        }
        let info = match (self.info(name), cached) {
            (Err(error), Some(folder)) if error.is_network() => {
                tracing::warn!(%error, folder = %folder.display(), "using the cached model");
                return Ok(folder);
            }
            (info, _) => info?,
        };
        let files: BTreeSet<&str> = info
            .siblings
            .iter()
            .map(|sibling| sibling.rfilename.as_str())
            .collect();
        // All of one commit, even if the branch moves on meanwhile.
        let fetch = |file: &str| self.cached_or_download(name, &info.sha, file);
        for file in files.iter().filter(|file| is_wanted(file)) {
            fetch(file)?;
        }
        if files.contains(WEIGHTS) {
            fetch(WEIGHTS)?;
        } else if files.contains(WEIGHTS_INDEX) {
            for shard in self.shards(name, &fetch(WEIGHTS_INDEX)?, &files)? {
                fetch(&shard)?;
            }
        } else {
            let gguf = files
                .iter()
                .filter(|file| is_gguf(file))
                .map(|&file| file.to_owned());
            return Err(HubError::NoWeights {
                what: name.what(None),
                gguf: gguf.collect(),
            });
        }
        let repo = self.cache.repo(name.repo());
        repo.create_ref(&info.sha)
            .map_err(|source| HubError::Transfer {
                what: name.what(None),
                source,
            })?;
        Ok(repo.pointer_path(&info.sha))
    }

    /// The files of a sharded model's weights.
    fn shards(
        &self,
        name: &ModelName,
        index: &Path,
        files: &BTreeSet<&str>,
    ) -> Result<Vec<String>, HubError> {
        let answer = |problem| HubError::Answer {
            endpoint: self.endpoint.clone(),
            what: name.what(Some(WEIGHTS_INDEX)),
            problem,
        };
        let index = WeightsIndex::read(index).map_err(answer)?;
        let shards = index.shards();
        match shards
            .iter()
            .find(|shard| !is_segment(shard) || !files.contains(*shard))
        {
            Some(shard) => Err(answer(format!(
                "it names '{shard}', which is no file of the repository"
            ))),
            None => Ok(shards.into_iter().map(str::to_owned).collect()),
        }
    }

    /// The folder of the commit that the cache has for a revision.
    fn snapshot(&self, name: &ModelName) -> Option<PathBuf> {
        let folder = self.cache.path().join(name.repo().folder_name());
        let commit = match std::fs::read_to_string(folder.join("refs").join(&name.revision)) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => name.revision.clone(),
        };
        is_commit(&commit).then(|| folder.join("snapshots").join(commit))
    }

    /// What the hub says of a repository.
    fn info(&self, name: &ModelName) -> Result<RepoInfo, HubError> {
        let answer = |problem| HubError::Answer {
            endpoint: self.endpoint.clone(),
            what: name.what(None),
            problem,
        };
        let request = self.api.repo(name.repo()).info_request();
        let text = request
            .call()
            .and_then(|mut response| response.body_mut().read_to_string());
        let text = text.map_err(|error| self.explain(Box::new(error).into(), name.what(None)))?;
        let info: RepoInfo =
            serde_json::from_str(&text).map_err(|error| answer(error.to_string()))?;
        if !is_commit(&info.sha) {
            return Err(answer(format!(
                "its commit is '{}', expected 40 hex digits",
                info.sha
            )));
        }
        Ok(info)
    }

    fn cached_or_download(
        &self,
        name: &ModelName,
        commit: &str,
        file: &str,
    ) -> Result<PathBuf, HubError> {
        let repo = self.cache.repo(repo_at(&name.repository, commit));
        let cached = repo.pointer_path(commit).join(file);
        if cached.is_file() {
            Ok(cached)
        } else {
            self.download(name, commit, file)
        }
    }

    /// Downloads a file, going on where a transfer broke off.
    fn download(&self, name: &ModelName, revision: &str, file: &str) -> Result<PathBuf, HubError> {
        let what = name.what(Some(file));
        let repo = repo_at(&name.repository, revision);
        let size = Cell::new(0);
        let mut attempt = 1;
        let path = loop {
            let bar = Bar::new(self.progress, &size);
            match self
                .api
                .repo(repo.clone())
                .download_with_progress(file, bar)
            {
                Ok(path) => break path,
                Err(error) if attempt < ATTEMPTS && is_worth_another_try(&error) => {
                    tracing::warn!(%error, %file, "the download broke off; going on");
                    if is_unusable_part(&error) {
                        self.discard_part(&repo, file);
                    }
                    attempt += 1;
                }
                Err(error) => return Err(self.explain(error, what)),
            }
        };
        let found = std::fs::metadata(&path).map(|metadata| metadata.len());
        match found {
            Ok(found) if found == size.get() => Ok(path),
            Ok(found) => {
                // Both the name and the blob that it points to.
                let blob = std::fs::canonicalize(&path);
                for wrong in [Ok(path), blob].into_iter().flatten() {
                    if let Err(error) = std::fs::remove_file(&wrong) {
                        tracing::error!(%error, path = %wrong.display(), "cannot discard it");
                    }
                }
                Err(HubError::Size {
                    what,
                    found,
                    expected: size.get(),
                })
            }
            Err(source) => Err(HubError::Transfer { what, source }),
        }
    }

    /// Removes what an earlier transfer left, so that the next begins anew.
    fn discard_part(&self, repo: &Repo, file: &str) {
        let address = self.api.repo(repo.clone()).url(file);
        // Failing here means that the next attempt fails, with the reason.
        if let Ok(metadata) = self.api.metadata(&address) {
            let mut part = self.cache.repo(repo.clone()).blob_path(metadata.etag());
            part.set_extension("part");
            let _ = std::fs::remove_file(part);
        }
    }

    fn explain(&self, error: ApiError, what: What) -> HubError {
        let endpoint = self.endpoint.clone();
        match error {
            ApiError::RequestError(error) => match *error {
                ureq::Error::StatusCode(404) => HubError::NotFound { endpoint, what },
                ureq::Error::StatusCode(status @ (401 | 403)) => HubError::Refused {
                    endpoint,
                    what,
                    status,
                },
                ureq::Error::StatusCode(status) => HubError::Status {
                    endpoint,
                    what,
                    status,
                },
                source => HubError::Network {
                    endpoint,
                    what,
                    source: Box::new(source),
                },
            },
            ApiError::IoError(source) => HubError::Transfer { what, source },
            ApiError::LockAcquisition(_) => HubError::Locked { what },
            other => HubError::Answer {
                endpoint,
                what,
                problem: other.to_string(),
            },
        }
    }
}

fn is_worth_another_try(error: &ApiError) -> bool {
    matches!(error, ApiError::IoError(_)) || is_unusable_part(error)
}

/// Whether what an earlier transfer left cannot be continued.
fn is_unusable_part(error: &ApiError) -> bool {
    match error {
        ApiError::InvalidResume => true,
        ApiError::RequestError(error) => matches!(**error, ureq::Error::StatusCode(416)),
        _ => false,
    }
}

/// One file's progress, and the size that the hub announced for it.
struct Bar<'a> {
    bar: ProgressBar,
    size: &'a Cell<u64>,
}

impl<'a> Bar<'a> {
    fn new(shown: bool, size: &'a Cell<u64>) -> Self {
        let target = if shown {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(None, target);
        let template = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self { bar, size }
    }
}

impl Progress for Bar<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        self.size.set(size as u64);
        self.bar.set_length(size as u64);
        self.bar.set_message(filename.to_owned());
    }

    fn update(&mut self, size: usize) {
        self.bar.inc(size as u64);
    }

    fn finish(&mut self) {
        self.bar.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(name: &str) -> (String, String, Option<String>) {
        let name = ModelName::parse(name).unwrap();
        (name.repository, name.revision, name.file)
    }

    fn expected(
        repository: &str,
        revision: &str,
        file: Option<&str>,
    ) -> (String, String, Option<String>) {
        (
            repository.to_owned(),
            revision.to_owned(),
            file.map(str::to_owned),
        )
    }

    #[test]
    fn names_are_taken_apart() {
        for (name, wanted) in [
            ("o/m", expected("o/m", "main", None)),
            ("o/m@v1.0", expected("o/m", "v1.0", None)),
            ("o/m@refs/pr/1", expected("o/m", "refs/pr/1", None)),
            ("o/m/a.gguf", expected("o/m", "main", Some("a.gguf"))),
            (
                "o/m/sub/a.GGUF",
                expected("o/m", "main", Some("sub/a.GGUF")),
            ),
            (
                "o/m@v1/sub/a.gguf",
                expected("o/m", "v1", Some("sub/a.gguf")),
            ),
            (
                "o/m@refs/pr/1/a.gguf",
                expected("o/m", "refs/pr/1", Some("a.gguf")),
            ),
        ] {
            assert_eq!(parsed(name), wanted, "{name}");
        }
    }

    #[test]
    fn malformed_names_are_refused_with_the_form_expected() {
        for name in [
            "",
            "m",
            "/m",
            "o/",
            "o/m/",
            "o/m@",
            "o/..",
            "o/m/../a.gguf",
            "o/m//a.gguf",
            "o/m/a.txt",
            "o/m?x",
            "o/m /a.gguf",
            "o/m/a.gguf@v1",
            "o/m@../a.gguf",
            "o/m%2f",
        ] {
            let error = ModelName::parse(name).unwrap_err().to_string();
            assert!(error.contains(&format!("'hf:{name}'")), "{error}");
            assert!(error.contains("expected hf:ORG/NAME"), "{error}");
        }
    }

    #[test]
    fn a_path_stays_as_it_is() {
        assert_eq!(
            resolve("some/model.gguf", false).unwrap(),
            PathBuf::from("some/model.gguf")
        );
    }

    #[test]
    fn only_files_of_a_model_are_wanted() {
        for file in [
            "config.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "chat_template.jinja",
        ] {
            assert!(is_wanted(file), "{file}");
        }
        for file in [
            "README.md",
            "onnx/config.json",
            "pytorch_model.bin",
            "tokenizer/../x",
        ] {
            assert!(!is_wanted(file), "{file}");
        }
    }
}
