//! compressed-tensors, the format of llm-compressor: integers of 4 or 8 bits, FP8, MXFP4 and NVFP4,
//! which groups of modules may mix.

use super::super::WeightsError;
use super::super::raw::RawType;
use super::floats::{Factor, Floats, Number, Scale};
use super::integers::{Integers, Packing, Zeros};
use super::{Finder, Form, fp8};
use regex::{Regex, RegexBuilder};
use serde_json::Value;

/// How the weights of some modules are stored.
struct Scheme<'a> {
    /// Name of the group in the settings.
    name: &'a str,
    targets: Vec<Target<'a>>,
    format: &'a str,
    weights: &'a Value,
}

/// Which modules a group is for.
enum Target<'a> {
    /// All linear layers.
    Linear,
    Named(&'a str),
    Pattern(Regex),
}

impl Scheme<'_> {
    fn is_for(&self, module: &str) -> bool {
        self.targets.iter().any(|target| match target {
            Target::Linear => true,
            Target::Named(name) => *name == module,
            // As Python's `re.match`, which looks at the beginning.
            Target::Pattern(pattern) => {
                let found = pattern.find(module);
                found.is_some_and(|found| found.start() == 0)
            }
        })
    }

    fn size(&self, key: &str) -> Option<usize> {
        self.weights.get(key)?.as_u64()?.try_into().ok()
    }

    /// Returns the error for a setting of the weights.
    fn refused(&self, finder: &Finder<'_>, key: &str, expected: &str) -> WeightsError {
        let found = self.weights.get(key).unwrap_or(&Value::Null);
        let key = format!("config_groups.{}.weights.{key}", self.name);
        finder.settings.refused(&key, found, expected)
    }

    /// Returns the number of inputs that share a scale.
    fn group(&self, finder: &Finder<'_>, inputs: usize) -> Result<usize, WeightsError> {
        match self.weights.get("strategy").and_then(Value::as_str) {
            Some("channel" | "tensor") => Ok(inputs.max(1)),
            Some("group" | "tensor_group") => {
                let size = self.size("group_size").filter(|&size| size > 0);
                let size =
                    size.ok_or_else(|| self.refused(finder, "group_size", "a positive number"))?;
                match inputs.is_multiple_of(size) {
                    true => Ok(size),
                    false => {
                        let expected = format!("a divisor of {inputs}");
                        Err(self.refused(finder, "group_size", &expected))
                    }
                }
            }
            _ => {
                let expected = "\"tensor\", \"channel\", \"group\" or \"tensor_group\"";
                Err(self.refused(finder, "strategy", expected))
            }
        }
    }
}

pub(super) fn find(finder: &mut Finder<'_>) -> Result<(), WeightsError> {
    let settings = finder.settings;
    if let Some(transforms) = settings.get("transform_config")
        && transforms.as_object().is_none_or(|all| !all.is_empty())
    {
        let expected = "empty: rotations of activations are not supported";
        return Err(settings.refused("transform_config", transforms, expected));
    }
    let schemes = schemes(finder)?;
    let scheme_of = |module: &str| schemes.iter().find(|scheme| scheme.is_for(module));
    for (suffix, kind) in [
        (".weight_packed", RawType::I32),
        (".weight_packed", RawType::U8),
        (".weight", RawType::I8),
        (".weight", RawType::F8E4M3),
    ] {
        for module in finder.modules(suffix, kind) {
            let Some(scheme) = scheme_of(&module) else {
                let problem = format!(
                    "quantization_config.config_groups has no target for {module:?}, whose \
                     weights are quantised"
                );
                return Err(settings.malformed(problem));
            };
            add(finder, scheme, &module, kind)?;
        }
    }
    Ok(())
}

/// Maximum number of names and patterns.
const MOST_TARGETS: usize = 1000;

/// Reads the groups of modules.
fn schemes<'a>(finder: &Finder<'a>) -> Result<Vec<Scheme<'a>>, WeightsError> {
    let settings = finder.settings;
    let groups = settings.get("config_groups").unwrap_or(&Value::Null);
    let groups = groups
        .as_object()
        .ok_or_else(|| settings.refused("config_groups", groups, "an object"))?;
    let common = settings.text("format")?.unwrap_or_default();
    let mut schemes = Vec::new();
    for (name, group) in groups {
        let key = |key: &str| format!("config_groups.{name}.{key}");
        let targets = group.get("targets").and_then(Value::as_array);
        let targets = targets.ok_or_else(|| {
            settings.refused(&key("targets"), "missing", "a list of names and patterns")
        })?;
        let found = targets.len();
        if found > MOST_TARGETS {
            let expected = format!("a list of at most {MOST_TARGETS}");
            return Err(settings.refused(&key("targets"), format!("a list of {found}"), &expected));
        }
        let read = |target: &'a Value| match target.as_str() {
            Some("Linear") => Ok(Target::Linear),
            Some(text) => match text.strip_prefix("re:") {
                None => Ok(Target::Named(text)),
                Some(pattern) => pattern_of(pattern).map(Target::Pattern).map_err(|error| {
                    let expected = format!("a pattern that can be read ({error})");
                    settings.refused(&key("targets"), target, &expected)
                }),
            },
            None => Err(settings.refused(&key("targets"), target, "a name or a pattern")),
        };
        let format = group.get("format").and_then(Value::as_str);
        schemes.push(Scheme {
            name,
            targets: targets.iter().map(read).collect::<Result<_, _>>()?,
            format: format.unwrap_or(common),
            weights: group.get("weights").unwrap_or(&Value::Null),
        });
    }
    // Groups that name modules come before those for all linear layers.
    let is_general = |scheme: &Scheme<'_>| {
        let mut targets = scheme.targets.iter();
        targets.any(|target| matches!(target, Target::Linear))
    };
    schemes.sort_by_key(is_general);
    Ok(schemes)
}

/// Compiles a pattern, which may take 64 KiB.
fn pattern_of(text: &str) -> Result<Regex, regex::Error> {
    RegexBuilder::new(text).size_limit(1 << 16).build()
}

/// Adds the matrix of a module.
fn add(
    finder: &mut Finder<'_>,
    scheme: &Scheme<'_>,
    module: &str,
    kind: RawType,
) -> Result<(), WeightsError> {
    let name = |part: &str| format!("{module}.{part}");
    match (scheme.format, kind) {
        ("pack-quantized", RawType::I32) => add_packed(finder, scheme, module),
        ("int-quantized" | "naive-quantized", RawType::I8) => {
            let weight = name("weight");
            let [outputs, inputs] = finder.matrix_shape(&weight)?;
            let zeros = name("weight_zero_point");
            let has_zeros = finder.has(&zeros);
            let integers = Integers {
                shape: vec![outputs, inputs],
                bits: 8,
                group: scheme.group(finder, inputs)?,
                codes: weight.clone(),
                packing: Packing::Bytes,
                scales: name("weight_scale"),
                scales_by_group: false,
                zeros: match has_zeros {
                    true => Zeros::Bytes(zeros),
                    false => Zeros::All(0),
                },
                order: None,
            };
            finder.add(weight, Form::Integers(integers))
        }
        ("float-quantized" | "naive-quantized", RawType::F8E4M3) => {
            let key = "block_structure";
            let sizes = scheme.weights.get(key).filter(|sizes| sizes.is_array());
            let block = sizes.map(|sizes| {
                fp8::block(sizes).ok_or_else(|| scheme.refused(finder, key, "two positive numbers"))
            });
            fp8::add(finder, module, block.transpose()?)
        }
        ("mxfp4-pack-quantized", RawType::U8) => {
            let (scale, group) = (Scale::Exponent, 32);
            add_fp4(finder, module, "weight_packed", scale, group, Factor::One)
        }
        ("nvfp4-pack-quantized", RawType::U8) => {
            let factor = Factor::Over(name("weight_global_scale"));
            add_fp4(finder, module, "weight_packed", Scale::E4m3, 16, factor)
        }
        (format, kind) => {
            let problem = format!(
                "quantization_config.config_groups.{} has the format {format:?}, but {module:?} \
                 has weights of type {kind:?}; supported are pack-quantized, int-quantized, \
                 float-quantized, mxfp4-pack-quantized and nvfp4-pack-quantized",
                scheme.name
            );
            Err(finder.settings.malformed(problem))
        }
    }
}

/// Adds a matrix of numbers of 4 bits, `group` of which share a scale.
pub(super) fn add_fp4(
    finder: &mut Finder<'_>,
    module: &str,
    part: &str,
    scale: Scale,
    group: usize,
    factor: Factor,
) -> Result<(), WeightsError> {
    let packed = format!("{module}.{part}");
    let [outputs, half] = finder.matrix_shape(&packed)?;
    let floats = Floats {
        shape: vec![outputs, half.saturating_mul(2)],
        number: Number::E2m1,
        numbers: packed,
        stored: vec![outputs, half],
        scale,
        scales: format!("{module}.weight_scale"),
        block: (1, group),
        factor,
    };
    finder.add(format!("{module}.weight"), Form::Floats(floats))
}

/// Adds a matrix of integers that are packed into words.
fn add_packed(
    finder: &mut Finder<'_>,
    scheme: &Scheme<'_>,
    module: &str,
) -> Result<(), WeightsError> {
    let name = |part: &str| format!("{module}.{part}");
    let packed = name("weight_packed");
    let bits = match scheme.size("num_bits") {
        Some(bits @ (2 | 4 | 8)) => bits as u32,
        _ => return Err(scheme.refused(finder, "num_bits", "2, 4 or 8")),
    };
    let [outputs, words] = finder.matrix_shape(&packed)?;
    let inputs = words.saturating_mul((32 / bits) as usize);
    // States the number of inputs before they were padded to whole words.
    finder.claim(name("weight_shape"));
    let zeros = name("weight_zero_point");
    let order = name("weight_g_idx");
    let has_zeros = finder.has(&zeros);
    let is_symmetric = scheme.weights.get("symmetric").and_then(Value::as_bool);
    if is_symmetric == Some(has_zeros) {
        let expected = match has_zeros {
            true => format!("false, because there is a tensor {zeros:?}"),
            false => format!("true, because there is no tensor {zeros:?}"),
        };
        return Err(scheme.refused(finder, "symmetric", &expected));
    }
    let integers = Integers {
        shape: vec![outputs, inputs],
        bits,
        group: scheme.group(finder, inputs)?,
        codes: packed,
        packing: Packing::Rows,
        scales: name("weight_scale"),
        scales_by_group: false,
        zeros: match has_zeros {
            true => Zeros::Columns(zeros),
            false => Zeros::All(1 << (bits - 1)),
        },
        order: finder.has(&order).then_some(order),
    };
    finder.add(name("weight"), Form::Integers(integers))
}
