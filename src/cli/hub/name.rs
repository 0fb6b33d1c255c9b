//! Names of models on a hub, taken apart and checked.

use super::error::{HubError, What};
use hf_hub::Repo;

/// What `hf:` is followed by, taken apart.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelName {
    /// `ORG/NAME`.
    pub repository: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// A GGUF file's path; a whole folder is meant if `None`.
    pub file: Option<String>,
}

impl ModelName {
    /// Reads `ORG/NAME[@REVISION][/FILE.gguf]`.
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

    /// Its repository, as the cache knows it.
    pub fn repo(&self) -> Repo {
        super::repo_at(&self.repository, &self.revision)
    }

    /// Its repository, or a file of it, as errors name it.
    pub fn what(&self, file: Option<&str>) -> What {
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

/// Whether it is named as a GGUF file is.
pub fn is_gguf(file: &str) -> bool {
    file.to_ascii_lowercase().ends_with(".gguf")
}

/// Whether it can be a part of a name, an address and a path, with the same meaning.
pub fn is_segment(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+=,".contains(&byte);
    !matches!(text, "" | "." | "..") && text.bytes().all(allowed)
}

/// Whether it is the name of a commit, not of a branch that may move.
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
