//! What a counted launch did, as a line of JSON.

use crate::ptx::{Class, Launch, Statistics};
use std::fmt::Write;

/// A launch that ran while launches were counted.
#[derive(Clone, Debug)]
pub struct Counted {
    /// Name of the kernel.
    pub kernel: String,
    /// Number of blocks per dimension.
    pub grid: [u32; 3],
    /// Number of threads per block and dimension.
    pub block: [u32; 3],
    /// Bytes of shared memory that the kernel declares.
    pub static_shared: usize,
    /// Bytes of shared memory that the launch adds.
    pub dynamic_shared: usize,
    /// What it did.
    pub statistics: Statistics,
}

impl Counted {
    /// Describes a launch and what it did.
    pub fn new(kernel: &str, launch: &Launch, static_shared: usize, ran: Statistics) -> Self {
        Self {
            kernel: kernel.to_owned(),
            grid: launch.grid,
            block: launch.block,
            static_shared,
            dynamic_shared: launch.dynamic_shared,
            statistics: ran,
        }
    }

    /// Formats it as one line of JSON.
    pub fn json(&self) -> String {
        let counts = self.statistics.counts.unwrap_or_default();
        let mut text = format!(
            r#"{{"kernel":"{}","grid":{:?},"block":{:?},"static_shared":{},"dynamic_shared":{}"#,
            self.kernel, self.grid, self.block, self.static_shared, self.dynamic_shared
        );
        let mut number = |name: &str, value: u64| {
            let _ = write!(text, r#","{name}":{value}"#);
        };
        number("instructions", counts.instructions());
        number("machine", counts.machine);
        number("lanes", counts.lanes);
        number("branches", counts.branches);
        number("divergent", counts.divergent);
        number("barriers", self.statistics.barriers);
        number("multiplications", counts.multiplications);
        number("read", counts.read);
        number("written", counts.written);
        let classes = Class::ALL.iter().zip(counts.classes);
        let classes = classes.filter(|(_, count)| *count > 0);
        object(
            &mut text,
            "classes",
            classes.map(|(class, count)| (class.name(), count.to_string())),
        );
        let global = counts.global.all().into_iter();
        let global = global.filter(|(_, found)| found.requests > 0);
        object(
            &mut text,
            "global",
            global.map(|(way, found)| {
                let values = [
                    ("requests", found.requests),
                    ("bytes", found.bytes),
                    ("sectors", found.sectors),
                ];
                (way, numbers(&values))
            }),
        );
        let shared = counts.shared.all().into_iter();
        let shared = shared.filter(|(_, found)| found.requests > 0);
        object(
            &mut text,
            "shared",
            shared.map(|(way, found)| {
                let values = [
                    ("requests", found.requests),
                    ("wavefronts", found.wavefronts),
                    ("least", found.least),
                ];
                (way, numbers(&values))
            }),
        );
        text.push('}');
        text
    }
}

/// Appends a member whose value is an object.
fn object<'a>(text: &mut String, name: &str, members: impl Iterator<Item = (&'a str, String)>) {
    let members = members.map(|(name, value)| format!(r#""{name}":{value}"#));
    let members = members.collect::<Vec<_>>().join(",");
    let _ = write!(text, r#","{name}":{{{members}}}"#);
}

/// Formats an object of numbers.
fn numbers(values: &[(&str, u64)]) -> String {
    let members = values
        .iter()
        .map(|(name, value)| format!(r#""{name}":{value}"#));
    format!("{{{}}}", members.collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ptx::Counts;

    #[test]
    fn a_launch_is_one_line_of_json_without_what_did_not_happen() {
        let mut counts = Counts {
            machine: 5,
            lanes: 96,
            read: 128,
            ..Counts::default()
        };
        counts.classes[Class::Global as usize] = 3;
        counts.global.load.requests = 1;
        counts.global.load.bytes = 128;
        counts.global.load.sectors = 4;
        let counted = Counted {
            kernel: "add".to_owned(),
            grid: [2, 1, 1],
            block: [32, 1, 1],
            static_shared: 16,
            dynamic_shared: 0,
            statistics: Statistics {
                barriers: 7,
                counts: Some(counts),
                ..Statistics::default()
            },
        };
        let expected = concat!(
            r#"{"kernel":"add","grid":[2, 1, 1],"block":[32, 1, 1],"static_shared":16,"dynamic_shared":0,"#,
            r#""instructions":3,"machine":5,"lanes":96,"branches":0,"divergent":0,"barriers":7,"#,
            r#""multiplications":0,"read":128,"written":0,"classes":{"global":3},"#,
            r#""global":{"load":{"requests":1,"bytes":128,"sectors":4}},"shared":{}}"#,
        );
        assert_eq!(counted.json(), expected);
    }
}
