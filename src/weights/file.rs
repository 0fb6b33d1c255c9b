//! A model file on disk, read at given offsets. It is never memory-mapped: if another
//! process truncates it, a read returns an error, where a mapping would raise `SIGBUS`.

use super::WeightsError;
use std::fs::File;
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};

/// A regular file, open for reading.
#[derive(Debug)]
pub(super) struct WeightFile {
    path: PathBuf,
    file: File,
    bytes: usize,
}

impl WeightFile {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// Returns [`WeightsError::Io`] if it is not a regular file or cannot be opened.
    pub(super) fn open(path: &Path) -> Result<Self, WeightsError> {
        let failed = |source| WeightsError::Io {
            path: path.to_owned(),
            source,
        };
        // Checked before opening, because opening a pipe waits for its writer.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            let problem = "it is a folder or a device, expected a file";
            return Err(failed(Error::new(ErrorKind::InvalidInput, problem)));
        }
        let file = File::open(path).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        let bytes = usize::try_from(bytes).map_err(|_| {
            let problem = format!("its {bytes} bytes are more than this machine can address");
            failed(Error::new(ErrorKind::FileTooLarge, problem))
        })?;
        Ok(Self {
            path: path.to_owned(),
            file,
            bytes,
        })
    }

    /// Returns the size of the file when it was opened, in bytes.
    pub(super) fn len(&self) -> usize {
        self.bytes
    }

    /// Fills `out` with the bytes of the file from `offset` on.
    ///
    /// # Errors
    /// Returns [`WeightsError::Shortened`] if the file ends before `out` is full, and
    /// [`WeightsError::Io`] if it cannot be read.
    pub(super) fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), WeightsError> {
        read_exact_at(&self.file, out, offset as u64).map_err(|source| match source.kind() {
            ErrorKind::UnexpectedEof => WeightsError::Shortened {
                path: self.path.clone(),
                expected: self.bytes as u64,
                found: self.file.metadata().map_or(0, |metadata| metadata.len()),
            },
            _ => WeightsError::Io {
                path: self.path.clone(),
                source,
            },
        })
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut out: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !out.is_empty() {
        match file.seek_read(out, offset) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                out = &mut out[count..];
                offset += count as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_shortened_after_it_was_opened_is_a_typed_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("weights");
        let contents: Vec<u8> = (0..20_000u32).map(|index| (index % 251) as u8).collect();
        std::fs::write(&path, &contents).unwrap();
        let file = WeightFile::open(&path).unwrap();
        assert_eq!(file.len(), contents.len());
        let mut found = vec![0; 10_000];
        file.read(5000, &mut found).unwrap();
        assert_eq!(found, contents[5000..15_000]);

        let writer = File::options().write(true).open(&path).unwrap();
        writer.set_len(8000).unwrap();
        match file.read(5000, &mut found) {
            Err(WeightsError::Shortened {
                path: named,
                expected: 20_000,
                found: 8000,
            }) => assert_eq!(named, path),
            other => panic!("not a shortened file: {other:?}"),
        }
        file.read(5000, &mut found[..3000]).unwrap();
        assert_eq!(found[..3000], contents[5000..8000]);
    }

    #[test]
    fn an_empty_file_opens_and_errors_name_what_is_not_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("empty");
        std::fs::write(&path, []).unwrap();
        let empty = WeightFile::open(&path).unwrap();
        assert_eq!(empty.len(), 0);
        empty.read(0, &mut []).unwrap();
        let error = WeightFile::open(&directory.path().join("absent")).unwrap_err();
        assert!(error.to_string().contains("absent"), "{error}");
        let error = WeightFile::open(directory.path()).unwrap_err();
        assert!(error.to_string().contains("expected a file"), "{error}");
    }
}
