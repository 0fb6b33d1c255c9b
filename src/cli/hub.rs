//! Models named `hf:ORG/NAME`: downloaded once from a Hugging Face hub, then found in its
//! cache.
//!
//! The cache is shared with the hub's other programs. `HF_HOME` sets its location,
//! `HF_ENDPOINT` selects another hub, and `HF_TOKEN` gives access to restricted
//! repositories. A folder's weights are downloaded last, so a folder that has its weights
//! is complete.

mod error;
mod files;
mod name;

pub use error::HubError;

use error::What;
use files::{CONFIG, PREFIX, TOKENIZER, WEIGHTS, WEIGHTS_INDEX, is_gguf, is_segment, is_wanted};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::api::{Progress, RepoInfo};
use hf_hub::{Cache, Repo};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use name::{ModelName, is_commit, repo_at};
use serde::Deserialize;
use std::cell::Cell;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

const ENDPOINT: &str = "https://huggingface.co";

/// Maximum number of attempts to download a file.
const ATTEMPTS: usize = 3;

/// Returns the path of a model: `model` itself, or the place in the cache of a folder
/// (`hf:ORG/NAME`, `hf:ORG/NAME@REVISION`) or a file (`hf:ORG/NAME/FILE.gguf`), which is
/// downloaded first if necessary.
///
/// A complete model in the cache is used without asking the hub. `progress` shows one
/// progress bar per file on stderr.
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

/// The index of a sharded model's weights.
#[derive(Deserialize)]
struct WeightsIndex {
    /// Name of the file that holds each tensor, by tensor name.
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

/// Returns whether a folder has a model's configuration and all of its weights.
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

/// A hub and the cache of its downloads.
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

    /// Returns the path of one file of a repository.
    fn single_file(&self, name: &ModelName, file: &str) -> Result<PathBuf, HubError> {
        let cached = self.snapshot(name).map(|folder| folder.join(file));
        match cached.filter(|path| path.is_file()) {
            Some(path) => Ok(path),
            None => self.download(name, &name.revision, file),
        }
    }

    /// Returns the path of a folder with a whole model.
    fn folder(&self, name: &ModelName) -> Result<PathBuf, HubError> {
        let cached = self.snapshot(name).filter(|folder| has_model(folder));
        // A folder without a tokenizer may be a partial download by another program.
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
        // Take all files from one commit, even if the branch moves in the meantime. The
        // branch's ref is written to the cache only after the last file.
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

    /// Returns the files that hold a sharded model's weights.
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
                "it names '{shard}', which is not a file of the repository"
            ))),
            None => Ok(shards.into_iter().map(str::to_owned).collect()),
        }
    }

    /// Returns the folder of the commit that the cache has for a revision.
    fn snapshot(&self, name: &ModelName) -> Option<PathBuf> {
        let folder = self.cache.path().join(name.repo().folder_name());
        let commit = match std::fs::read_to_string(folder.join("refs").join(&name.revision)) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => name.revision.clone(),
        };
        is_commit(&commit).then(|| folder.join("snapshots").join(commit))
    }

    /// Asks the hub for the commit and the files of a repository.
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

    /// Downloads a file. After an interruption, continues where the transfer stopped.
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
                    tracing::warn!(%error, %file, "the download was interrupted; resuming");
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
                // Remove both the name and the blob that it points to.
                let blob = std::fs::canonicalize(&path);
                for wrong in [Ok(path), blob].into_iter().flatten() {
                    if let Err(error) = std::fs::remove_file(&wrong) {
                        tracing::error!(%error, path = %wrong.display(), "cannot delete the \
                                                                          incomplete file");
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

    /// Removes what an earlier transfer left, so that the next one starts from the
    /// beginning.
    fn discard_part(&self, repo: &Repo, file: &str) {
        let address = self.api.repo(repo.clone()).url(file);
        // If this fails, the next attempt fails too, and reports the reason.
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

/// Returns whether the error means that an earlier transfer cannot be continued.
fn is_unusable_part(error: &ApiError) -> bool {
    match error {
        ApiError::InvalidResume => true,
        ApiError::RequestError(error) => matches!(**error, ureq::Error::StatusCode(416)),
        _ => false,
    }
}

/// Progress bar of one file, which also records the size that the hub announced.
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
