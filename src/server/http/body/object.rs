//! Reads objects as objects only. The implementation that serde derives for a struct, or for an
//! enum with a tag, would also accept a list of its fields' values.

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::marker::PhantomData;

/// A value that is read from an object.
#[derive(Debug)]
pub(crate) struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ObjectVisitor(PhantomData))
    }
}

struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
    type Value = Object<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Self::Value, A::Error> {
        T::deserialize(MapAccessDeserializer::new(fields)).map(Object)
    }
}

/// Reads a field that is null or an object.
pub(crate) fn optional<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let object = Option::<Object<T>>::deserialize(deserializer)?;
    Ok(object.map(|Object(value)| value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[derive(Debug, Default, Deserialize, PartialEq)]
    struct Point {
        x: Option<u32>,
        #[serde(default, deserialize_with = "optional")]
        inner: Option<Tagged>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(tag = "type", rename_all = "snake_case")]
    enum Tagged {
        Plain,
    }

    fn read(value: Value) -> Result<Point, String> {
        let read = serde_json::from_value(value).map(|Object(point)| point);
        read.map_err(|error| error.to_string())
    }

    #[test]
    fn only_objects_are_read() {
        let nothing = || Ok(Point::default());
        assert_eq!(read(json!({})), nothing());
        assert_eq!(read(json!({"inner": null})), nothing());
        let inner = Some(Tagged::Plain);
        assert_eq!(
            read(json!({"x": 1, "inner": {"type": "plain"}})),
            Ok(Point { x: Some(1), inner })
        );
        for wrong in [
            json!([]),
            json!([1, null]),
            json!(5),
            json!(null),
            json!({"inner": []}),
            json!({"inner": ["plain"]}),
            json!({"inner": "plain"}),
        ] {
            let problem = read(wrong.clone()).unwrap_err();
            assert!(problem.contains("expected an object"), "{wrong}: {problem}");
        }
    }
}
