//! Names of models on a hub, parsed and checked.

use super::error::{HubError, What};
use super::files::{is_gguf, is_segment};
use hf_hub::{Repo, RepoType};

/// The parsed name of a model: what follows `hf:`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelName {
    /// The repository, as `ORG/NAME`.
    pub repository: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// Path of a GGUF file in the repository; the whole folder if `None`.
    pub file: Option<String>,
}

impl ModelName {
    /// Parses `ORG/NAME[@REVISION][/FILE.gguf]`.
    pub fn parse(name: &str) -> Result<Self, HubError> {
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
                return Err(malformed("the revision must follow the name directly"));
            }
            (revision, file) = split_revision(pinned);
        }
        let mut segments = [org, repo].into_iter().chain(revision.split('/'));
        if !segments.all(is_segment) || !file.is_none_or(|file| file.split('/').all(is_segment)) {
            return Err(malformed(
                "a part of it is empty or has characters that names cannot have",
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

    /// Returns the repository in the form that the cache uses.
    pub fn repo(&self) -> Repo {
        repo_at(&self.repository, &self.revision)
    }

    /// Returns the repository, or one of its files, in the form that errors use.
    pub fn what(&self, file: Option<&str>) -> What {
        What {
            file: file.map(str::to_owned),
            repository: self.repository.clone(),
            revision: self.revision.clone(),
        }
    }
}

/// Returns a repository in the form that the cache uses.
pub fn repo_at(repository: &str, revision: &str) -> Repo {
    Repo::with_revision(repository.to_owned(), RepoType::Model, revision.to_owned())
}

/// Splits `REVISION[/FILE.gguf]`. Revisions such as `refs/pr/1` contain slashes themselves.
fn split_revision(pinned: &str) -> (&str, Option<&str>) {
    let slashes = if pinned.starts_with("refs/") { 3 } else { 1 };
    match pinned.match_indices('/').nth(slashes - 1) {
        Some((end, _)) if is_gguf(pinned) => (&pinned[..end], Some(&pinned[end + 1..])),
        _ => (pinned, None),
    }
}

/// Returns whether the text is the hash of a commit rather than a branch, which may move.
pub fn is_commit(text: &str) -> bool {
    text.len() >= 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
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
}
