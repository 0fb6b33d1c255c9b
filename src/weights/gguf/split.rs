//! Finds and joins the parts of split GGUF files.

use super::header::Header;
use super::{Gguf, Problem};
use crate::weights::WeightsError;
use crate::weights::directory::Contents;
use crate::weights::file::WeightFile;
use std::path::{Path, PathBuf};

/// Maximum number of parts: the file names have five digits for it.
const MOST_PARTS: u64 = 99_999;

impl Gguf {
    /// Opens the parts after the first, if this is the first of several.
    pub(super) fn open_other_parts(&mut self) -> Result<(), WeightsError> {
        let Some(count) = self.part_count()? else {
            return Ok(());
        };
        let first = self.path().to_owned();
        for number in 1..count {
            let path = part_path(&first, number, count)?;
            if !path.exists() {
                return Err(WeightsError::MissingFile {
                    reason: format!("{} is split into {count} parts", first.display()),
                    path,
                });
            }
            let contents = Contents::File(WeightFile::open(&path)?);
            let header = Header::of(&contents, &path)?;
            let stated = (
                integer(&header, "split.no"),
                integer(&header, "split.count"),
            );
            if stated != (Some(number), Some(count)) {
                return Err(Problem::malformed(format!(
                    "its \"split.no\" and \"split.count\" are {stated:?}, expected part {number} \
                     of {count}"
                ))
                .at(&path));
            }
            self.add_part(&path, contents, header.tensors)?;
        }
        self.check_tensor_count(&first)
    }

    /// Fails if this is a part of a split file, where only whole files can be read.
    #[cfg(any(test, feature = "internals"))]
    pub(super) fn refuse_parts(&self) -> Result<(), WeightsError> {
        match self.part_count()? {
            None => Ok(()),
            Some(count) => Err(Problem::Unsupported {
                what: format!("one of {count} parts of a split file"),
                expected: "open the first part from the folder that holds them all".into(),
            }
            .at(self.path())),
        }
    }

    /// Returns the number of parts if this is the first part of a split file, or `None` for
    /// a whole file.
    fn part_count(&self) -> Result<Option<u64>, WeightsError> {
        let Some(count) = self.metadata("split.count") else {
            return Ok(None);
        };
        let malformed = |problem: String| Err(Problem::malformed(problem).at(self.path()));
        let Some(count) = count.as_u64().filter(|&count| count <= MOST_PARTS) else {
            return malformed(format!(
                "metadata \"split.count\" is {count:?}; it must be an integer up to {MOST_PARTS}"
            ));
        };
        if count <= 1 {
            return Ok(None);
        }
        match self.metadata("split.no").and_then(|value| value.as_u64()) {
            Some(0) => Ok(Some(count)),
            Some(number) if number < count => Err(Problem::Unsupported {
                what: format!("part {} of {count} of a split file", number + 1),
                expected: "open the first part; the others are found next to it".into(),
            }
            .at(self.path())),
            number => malformed(format!(
                "metadata \"split.no\" is {number:?}; it must be an integer below {count}"
            )),
        }
    }

    fn check_tensor_count(&self, first: &Path) -> Result<(), WeightsError> {
        let stated = self
            .metadata("split.tensors.count")
            .and_then(|value| value.as_u64());
        match stated {
            Some(stated) if stated != self.directory.len() as u64 => {
                Err(Problem::malformed(format!(
                    "metadata \"split.tensors.count\" is {stated}, but the parts hold {} tensors",
                    self.directory.len()
                ))
                .at(first))
            }
            _ => Ok(()),
        }
    }
}

fn integer(header: &Header, key: &str) -> Option<u64> {
    header.metadata.get(key)?.as_u64()
}

/// Returns the path of part `number`, counted from 0, in the folder of the first part.
fn part_path(first: &Path, number: u64, count: u64) -> Result<PathBuf, WeightsError> {
    let ending = format!("-00001-of-{count:05}.gguf");
    let name = first.file_name().and_then(|name| name.to_str());
    let Some(stem) = name.and_then(|name| name.strip_suffix(&ending)) else {
        return Err(Problem::Unsupported {
            what: format!("the name of the first of {count} parts"),
            expected: format!("it must end in {ending:?} for the others to be found"),
        }
        .at(first));
    };
    Ok(first.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", number + 1)))
}
