//! Handles of contexts, streams, events, modules, functions and graphs. A handle is a number
//! that encodes its kind and is never reused, so that a freed handle, a handle of the wrong
//! kind and an invalid pointer can be told apart.

use std::collections::BTreeMap;

/// The kind of object that a handle stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `CUcontext`.
    Context,
    /// `CUstream`.
    Stream,
    /// `CUevent`.
    Event,
    /// `CUmodule`.
    Module,
    /// `CUfunction`.
    Function,
    /// `CUgraph`.
    Graph,
    /// `CUgraphExec`.
    Exec,
}

const KINDS: [Kind; 7] = [
    Kind::Context,
    Kind::Stream,
    Kind::Event,
    Kind::Module,
    Kind::Function,
    Kind::Graph,
    Kind::Exec,
];

/// Handles point into unmapped address space, so that dereferencing one crashes.
const BASE: u64 = 0x1000_0000_0000;
const KIND_SHIFT: u32 = 36;
const SERIAL_SHIFT: u32 = 4;

impl Kind {
    /// Returns the kind with its article, such as "a stream".
    pub fn noun(self) -> &'static str {
        match self {
            Kind::Context => "a context",
            Kind::Stream => "a stream",
            Kind::Event => "an event",
            Kind::Module => "a module",
            Kind::Function => "a function",
            Kind::Graph => "a graph",
            Kind::Exec => "an executable graph",
        }
    }

    fn tag(self) -> u64 {
        self as u64 + 1
    }

    fn handle(self, serial: u64) -> u64 {
        BASE | self.tag() << KIND_SHIFT | serial << SERIAL_SHIFT
    }

    /// Returns the kind and serial number that a handle encodes, whether or not it was ever
    /// issued.
    fn decode(handle: u64) -> Option<(Kind, u64)> {
        if handle & !0xfff_ffff_ffff != BASE || handle & 0xf != 0 {
            return None;
        }
        let tag = handle >> KIND_SHIFT & 0xff;
        let kind = *KINDS.get(tag.checked_sub(1)? as usize)?;
        Some((kind, handle >> SERIAL_SHIFT & 0xffff_ffff))
    }
}

/// The live objects of one kind.
#[derive(Debug)]
pub struct Table<T> {
    kind: Kind,
    next: u64,
    live: BTreeMap<u64, T>,
}

impl<T> Table<T> {
    /// Creates an empty table.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            next: 1,
            live: BTreeMap::new(),
        }
    }

    /// Adds an object and returns its handle.
    pub fn insert(&mut self, object: T) -> u64 {
        let handle = self.kind.handle(self.next);
        self.next += 1;
        self.live.insert(handle, object);
        handle
    }

    /// Returns the object, if the handle is live.
    pub fn get(&self, handle: u64) -> Option<&T> {
        self.live.get(&handle)
    }

    /// Returns the object, if the handle is live.
    pub fn get_mut(&mut self, handle: u64) -> Option<&mut T> {
        self.live.get_mut(&handle)
    }

    /// Removes the object. Its handle is never reused.
    pub fn remove(&mut self, handle: u64) -> Option<T> {
        self.live.remove(&handle)
    }

    /// Iterates over the live objects, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.live.iter().map(|(handle, object)| (*handle, object))
    }

    /// Iterates over the live objects, oldest first.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.live.values_mut()
    }

    /// Returns the handles of the live objects that match the filter.
    pub fn handles(&self, mut wanted: impl FnMut(&T) -> bool) -> Vec<u64> {
        let of = self.live.iter().filter(|(_, object)| wanted(object));
        of.map(|(handle, _)| *handle).collect()
    }

    /// Describes what is wrong with a handle that is not live in this table.
    pub fn explain(&self, handle: u64) -> String {
        let wanted = self.kind.noun();
        if handle == 0 {
            return format!("null, expected {wanted}");
        }
        match Kind::decode(handle) {
            Some((kind, serial)) if kind == self.kind && serial < self.next && serial > 0 => {
                format!("{handle:#x} was {wanted} and has been destroyed")
            }
            Some((kind, _)) if kind != self.kind => {
                format!("{handle:#x} is {}, not {wanted}", kind.noun())
            }
            _ => format!("{handle:#x} never was {wanted}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_explain_what_is_wrong_with_a_handle() {
        let mut streams = Table::new(Kind::Stream);
        let mut events = Table::new(Kind::Event);
        let stream = streams.insert(1);
        let event = events.insert(2);
        assert_eq!(streams.get(stream), Some(&1));
        assert_eq!(streams.get(event), None);
        assert!(streams.explain(event).contains("is an event, not a stream"));
        assert!(streams.explain(0).contains("null"));
        assert!(streams.explain(0xdead_beef).contains("never was a stream"));
        assert_eq!(streams.remove(stream), Some(1));
        assert!(streams.explain(stream).contains("destroyed"));
        assert_ne!(streams.insert(3), stream);
    }
}
