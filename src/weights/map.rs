//! A model file as a byte slice: mapped, not copied, so that weights which a
//! device has repacked need not stay in memory.

use super::WeightsError;
use memmap2::Mmap;
use std::fs::File;
use std::io::{Error, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A file mapped read-only into memory.
///
/// The file must not be changed or truncated while it is open: another process
/// that writes to it changes the bytes under quell, and one that truncates it
/// makes the operating system end the process (`SIGBUS`). Replacing it by
/// renaming another file over it is fine. Keeping to this is up to whoever owns
/// the file; no reader of mapped files can check it.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// [`WeightsError::Io`] when it is no regular file, or cannot be opened or
    /// mapped.
    #[allow(unsafe_code)]
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let failed = |source| WeightsError::Io {
            path: path.to_owned(),
            source,
        };
        // Asked before opening: opening a pipe waits for its writer.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            let problem = "it is a folder or a device; a file was expected";
            return Err(failed(Error::new(ErrorKind::InvalidInput, problem)));
        }
        let file = File::open(path).map_err(failed)?;
        // SAFETY: the mapping is read-only and private to this value, and that
        // nobody changes the file underneath it is the documented duty of the
        // file's owner.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            map,
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's contents.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Lets the operating system drop the pages of `range` from this process's
    /// memory; reading them later brings them back from the file. Does nothing
    /// where the system offers no such call, or when `range` is not inside the
    /// file.
    #[allow(unsafe_code)]
    pub fn release(&self, range: Range<usize>) {
        if range.start >= range.end || range.end > self.map.len() {
            return;
        }
        #[cfg(unix)]
        {
            // SAFETY: the mapping is read-only and backed by the file, so a
            // dropped page reads back as the same bytes.
            let advised = unsafe {
                self.map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    range.start,
                    range.end - range.start,
                )
            };
            if let Err(error) = advised {
                tracing::debug!(path = %self.path.display(), %error, "pages were not released");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_pages_read_back_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bytes");
        let contents: Vec<u8> = (0..20_000u32).map(|index| (index % 251) as u8).collect();
        std::fs::write(&path, &contents).unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert_eq!(file.bytes(), contents);
        file.release(5000..15_000);
        file.release(0..contents.len() + 1);
        #[allow(clippy::reversed_empty_ranges)]
        file.release(7..3);
        assert_eq!(file.bytes(), contents);
    }

    #[test]
    fn an_empty_file_maps_to_no_bytes_and_what_is_no_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("empty");
        std::fs::write(&path, []).unwrap();
        assert!(MappedFile::open(&path).unwrap().bytes().is_empty());
        let error = MappedFile::open(&directory.path().join("absent")).unwrap_err();
        assert!(error.to_string().contains("absent"), "{error}");
        let error = MappedFile::open(directory.path()).unwrap_err();
        assert!(error.to_string().contains("a file was expected"), "{error}");
    }
}
