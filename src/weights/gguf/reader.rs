//! A cursor over untrusted bytes: every length is checked against the rest of the file
//! before anything is allocated.

use super::Problem;
use super::value::{Array, Value};

/// Maximum length of a key or a tensor name in the format, in bytes.
const LONGEST_NAME: u64 = u16::MAX as u64;

/// Reads little-endian numbers, strings and metadata values in order.
pub(super) struct Reader<'a> {
    /// The beginning of the file, or all of it.
    bytes: &'a [u8],
    position: usize,
    /// Size of the whole file in bytes.
    end: usize,
}

/// A fixed-width number, stored little-endian.
pub(super) trait Number: Sized {
    const BYTES: usize;
    /// Converts exactly [`Self::BYTES`] bytes.
    fn from_le(bytes: &[u8]) -> Option<Self>;
}

macro_rules! numbers {
    ($($number:ty),*) => {
        $(impl Number for $number {
            const BYTES: usize = size_of::<$number>();
            fn from_le(bytes: &[u8]) -> Option<Self> {
                Some(<$number>::from_le_bytes(bytes.try_into().ok()?))
            }
        })*
    };
}
numbers!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);

impl<'a> Reader<'a> {
    /// Creates a reader for a file of `end` bytes that begins with `bytes`. It fails with
    /// [`Problem::Short`] if it needs more of the file than `bytes` holds.
    pub(super) fn new(bytes: &'a [u8], end: usize) -> Self {
        Self {
            bytes,
            position: 0,
            end,
        }
    }

    /// Returns the offset of the next byte in the file.
    pub(super) fn position(&self) -> usize {
        self.position
    }

    fn left(&self) -> usize {
        self.end - self.position
    }

    /// Takes the next `count` bytes. Errors say that they are part of `what`.
    pub(super) fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8], Problem> {
        let left = self.left();
        if count > left {
            return Err(Problem::malformed(format!(
                "{what} at offset {} needs {count} bytes but the file ends after {left}",
                self.position
            )));
        }
        let start = self.position;
        let end = start + count;
        let taken = self.bytes.get(start..end);
        let taken = taken.ok_or(Problem::Short { needed: end })?;
        self.position = end;
        Ok(taken)
    }

    pub(super) fn number<T: Number>(&mut self, what: &str) -> Result<T, Problem> {
        let offset = self.position;
        T::from_le(self.take(T::BYTES, what)?)
            .ok_or_else(|| Problem::malformed(format!("{what} at offset {offset} is not a number")))
    }

    /// Reads a count of items that take at least `smallest` bytes each. Fails if the rest
    /// of the file cannot hold that many.
    pub(super) fn count(&mut self, smallest: usize, what: &str) -> Result<usize, Problem> {
        let offset = self.position;
        let count: u64 = self.number(what)?;
        let most = self.left() / smallest;
        match usize::try_from(count) {
            Ok(count) if count <= most => Ok(count),
            _ => Err(Problem::malformed(format!(
                "{what} at offset {offset} is {count}, but the rest of the file holds at most {most}"
            ))),
        }
    }

    /// Reads a string of at most `longest` bytes.
    fn string(&mut self, longest: u64, what: &str) -> Result<&'a str, Problem> {
        let offset = self.position;
        let length = self.count(1, &format!("the length of {what}"))?;
        if length as u64 > longest {
            return Err(Problem::malformed(format!(
                "{what} at offset {offset} is {length} bytes long; at most {longest} are allowed"
            )));
        }
        std::str::from_utf8(self.take(length, what)?)
            .map_err(|error| Problem::malformed(format!("{what} at offset {offset}: {error}")))
    }

    /// Reads a key or a tensor name.
    pub(super) fn name(&mut self, what: &str) -> Result<&'a str, Problem> {
        self.string(LONGEST_NAME, what)
    }

    fn truth(&mut self, what: &str) -> Result<bool, Problem> {
        let offset = self.position;
        match self.number::<u8>(what)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Problem::malformed(format!(
                "{what} at offset {offset} is {other}; a bool must be 0 or 1"
            ))),
        }
    }

    /// Reads the value of metadata `key`: its type, then its content.
    pub(super) fn value(&mut self, key: &str) -> Result<Value, Problem> {
        let what = format!("metadata {key:?}");
        let what = what.as_str();
        let kind: u32 = self.number(what)?;
        Ok(match kind {
            0 => Value::U8(self.number(what)?),
            1 => Value::I8(self.number(what)?),
            2 => Value::U16(self.number(what)?),
            3 => Value::I16(self.number(what)?),
            4 => Value::U32(self.number(what)?),
            5 => Value::I32(self.number(what)?),
            6 => Value::F32(self.number(what)?),
            7 => Value::Bool(self.truth(what)?),
            8 => Value::String(self.string(u64::MAX, what)?.to_owned()),
            9 => Value::Array(self.array(what)?),
            10 => Value::U64(self.number(what)?),
            11 => Value::I64(self.number(what)?),
            12 => Value::F64(self.number(what)?),
            other => {
                return Err(Problem::malformed(format!(
                    "{what} has type {other}; the type must be 0 to 12"
                )));
            }
        })
    }

    fn array(&mut self, what: &str) -> Result<Array, Problem> {
        let kind: u32 = self.number(what)?;
        Ok(match kind {
            0 => Array::U8(self.numbers(what)?),
            1 => Array::I8(self.numbers(what)?),
            2 => Array::U16(self.numbers(what)?),
            3 => Array::I16(self.numbers(what)?),
            4 => Array::U32(self.numbers(what)?),
            5 => Array::I32(self.numbers(what)?),
            6 => Array::F32(self.numbers(what)?),
            7 => {
                let count = self.array_length(1, what)?;
                Array::Bool(collect(count, || self.truth(what))?)
            }
            8 => {
                let count = self.array_length(size_of::<u64>(), what)?;
                Array::String(collect(count, || {
                    Ok(self.string(u64::MAX, what)?.to_owned())
                })?)
            }
            9 => {
                return Err(Problem::Unsupported {
                    what: format!("{what}, an array of arrays,"),
                    expected: "expected an array of numbers, bools or strings".into(),
                });
            }
            10 => Array::U64(self.numbers(what)?),
            11 => Array::I64(self.numbers(what)?),
            12 => Array::F64(self.numbers(what)?),
            other => {
                return Err(Problem::malformed(format!(
                    "{what} is an array of type {other}; the type must be 0 to 12"
                )));
            }
        })
    }

    fn array_length(&mut self, smallest: usize, what: &str) -> Result<usize, Problem> {
        self.count(smallest, &format!("the length of {what}"))
    }

    fn numbers<T: Number>(&mut self, what: &str) -> Result<Vec<T>, Problem> {
        let count = self.array_length(T::BYTES, what)?;
        let bytes = self.take(count * T::BYTES, what)?;
        Ok(bytes
            .chunks_exact(T::BYTES)
            .filter_map(T::from_le)
            .collect())
    }
}

/// Calls `read` `count` times and collects the values. The caller has checked that `count`
/// values fit in the file.
fn collect<T>(
    count: usize,
    mut read: impl FnMut() -> Result<T, Problem>,
) -> Result<Vec<T>, Problem> {
    (0..count).map(|_| read()).collect()
}
