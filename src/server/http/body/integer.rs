//! Reads integers in requests. As in JSON Schema, `16.0` is an integer.

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, SeqAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// Up to this magnitude, every integer has an exact float.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// A type that an integer in a request may be read as.
pub(crate) trait Integer: TryFrom<i128> {
    /// Description of the accepted values, for error messages.
    const EXPECTED: &'static str;
}

impl Integer for u32 {
    const EXPECTED: &'static str = "an integer from 0 to 4294967295";
}

impl Integer for u64 {
    const EXPECTED: &'static str = "an integer, 0 or more";
}

impl Integer for usize {
    const EXPECTED: &'static str = "an integer, 0 or more";
}

impl Integer for i32 {
    const EXPECTED: &'static str = "an integer from -2147483648 to 2147483647";
}

impl Integer for i64 {
    const EXPECTED: &'static str = "an integer from -2^63 to 2^63 - 1";
}

/// Returns the integer that a number equals, if there is one.
pub(crate) fn of_float(number: f64) -> Option<i128> {
    (number.fract() == 0.0 && number.abs() <= EXACT).then_some(number as i128)
}

/// Reads an integer.
struct One<T>(PhantomData<T>);

impl<'de, T: Integer> Visitor<'de> for One<T> {
    type Value = T;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(T::EXPECTED)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        let wrong = || E::invalid_value(serde::de::Unexpected::Signed(number), &self);
        T::try_from(i128::from(number)).map_err(|_| wrong())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        let wrong = || E::invalid_value(serde::de::Unexpected::Unsigned(number), &self);
        T::try_from(i128::from(number)).map_err(|_| wrong())
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<T, E> {
        let integer = of_float(number).and_then(|integer| T::try_from(integer).ok());
        integer.ok_or_else(|| E::invalid_value(serde::de::Unexpected::Float(number), &self))
    }
}

impl<'de, T: Integer> DeserializeSeed<'de> for One<T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// Reads an integer or null.
struct Optional<T>(PhantomData<T>);

impl<'de, T: Integer> Visitor<'de> for Optional<T> {
    type Value = Option<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(T::EXPECTED)
    }

    fn visit_none<E: Error>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_unit<E: Error>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        One(PhantomData).deserialize(deserializer).map(Some)
    }
}

/// Reads a list of integers.
struct Several<T>(PhantomData<T>);

impl<'de, T: Integer> Visitor<'de> for Several<T> {
    type Value = Vec<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of integers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
        let mut integers = Vec::new();
        while let Some(integer) = items.next_element_seed(One(PhantomData))? {
            integers.push(integer);
        }
        Ok(integers)
    }
}

/// Reads a list of integers or null.
struct OptionalList<T>(PhantomData<T>);

impl<'de, T: Integer> Visitor<'de> for OptionalList<T> {
    type Value = Option<Vec<T>>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of integers")
    }

    fn visit_none<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        list(deserializer).map(Some)
    }
}

/// For `#[serde(default, deserialize_with = …)]` on an `Option` of an integer.
pub(crate) fn optional<'de, T: Integer, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    deserializer.deserialize_option(Optional(PhantomData))
}

/// Like [`optional`], for a list of integers.
pub(crate) fn list<'de, T: Integer, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    deserializer.deserialize_seq(Several(PhantomData))
}

/// Like [`optional`], for an `Option` of a list of integers.
pub(crate) fn optional_list<'de, T: Integer, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<T>>, D::Error> {
    deserializer.deserialize_option(OptionalList(PhantomData))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, Default, Deserialize, PartialEq)]
    struct Fields {
        #[serde(default, deserialize_with = "super::optional")]
        count: Option<u32>,
        #[serde(default, deserialize_with = "super::optional")]
        signed: Option<i64>,
        #[serde(default, deserialize_with = "super::optional_list")]
        ids: Option<Vec<u32>>,
    }

    #[test]
    fn integers_may_be_written_as_floats() {
        for (fields, expected) in [
            (
                json!({"count": 16.0, "signed": -1.0, "ids": [1, 2.0]}),
                (Some(16), Some(-1), Some(vec![1, 2])),
            ),
            (
                json!({"count": 16, "signed": -1, "ids": []}),
                (Some(16), Some(-1), Some(vec![])),
            ),
            (
                json!({"count": null, "signed": null, "ids": null}),
                (None, None, None),
            ),
            (
                json!({"signed": 9.0e15}),
                (None, Some(9_000_000_000_000_000), None),
            ),
            (json!({}), (None, None, None)),
        ] {
            let read: Fields = serde_json::from_value(fields).unwrap();
            let (count, signed, ids) = expected;
            assert_eq!(read, Fields { count, signed, ids });
        }
    }

    #[test]
    fn non_integers_and_integers_out_of_range_are_refused() {
        for fields in [
            json!({"count": 16.5}),
            json!({"count": -1}),
            json!({"count": -1.0}),
            json!({"count": 4_294_967_296u64}),
            json!({"count": 1e300}),
            json!({"count": "16"}),
            json!({"count": true}),
            json!({"count": [1]}),
            json!({"signed": 1e19}),
            json!({"ids": 1}),
            json!({"ids": [1.5]}),
            json!({"ids": [null]}),
        ] {
            let error = serde_json::from_value::<Fields>(fields.clone()).unwrap_err();
            assert!(error.to_string().contains("integer"), "{fields}: {error}");
        }
    }
}
